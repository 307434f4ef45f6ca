"""Steps of SLURM: where their tasks meet, and that they meet nobody else."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import pytest

from prep.errors import UsageError
from train.slurm import adopt_step, step_store

MINUTE = timedelta(minutes=1)


def _adopt(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "4242"}
    kept = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    monkeypatch.setattr(os, "environ", {**kept, **step, **variables})
    adopt_step()


def test_the_steps_of_a_job_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for job in range(4240, 4250):
        for step in [*map(str, range(9)), "4294967290", "4294967291"]:  # interactive, batch
            place = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": step, "MASTER_ADDR": "n1"}
            _adopt(monkeypatch, **place)
            ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 10 * 11
    assert min(ports) >= 15000
    assert max(ports) < 25000
    _adopt(monkeypatch, MASTER_ADDR="n1", MASTER_PORT="77")
    assert os.environ["MASTER_PORT"] == "77"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu07.cluster,gpu08.cluster", "gpu07.cluster"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("rack[1,3]-gpu[2-4]", "rack1-gpu2"),
    ],
)
def test_tasks_meet_on_the_first_node_wherever_srun_runs(
    monkeypatch: pytest.MonkeyPatch, nodes: str, first: str
) -> None:
    _adopt(monkeypatch, SLURM_STEP_NODELIST=nodes, SLURM_LAUNCH_NODE_IPADDR="10.0.0.1")
    assert os.environ["MASTER_ADDR"] == first
    _adopt(monkeypatch, SLURM_LAUNCH_NODE_IPADDR="10.0.0.1")
    assert os.environ["MASTER_ADDR"] == "10.0.0.1"


def test_tasks_of_another_step_at_the_same_port_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    _adopt(monkeypatch, SLURM_STEP_ID="0", **place)
    held = step_store(0, MINUTE)
    assert held is not None
    assert step_store(1, MINUTE) is not None
    _adopt(monkeypatch, SLURM_STEP_ID="1", **place)
    with pytest.raises(UsageError, match=r"is that of step 4242\.0, and this is step 4242\.1; set"):
        step_store(1, MINUTE)
    with pytest.raises(UsageError, match=r"is that of step 4242\.0"):
        step_store(0, MINUTE)
    _adopt(monkeypatch, SLURM_JOB_ID="4243", SLURM_STEP_ID="0", **place)
    with pytest.raises(UsageError, match=r"this is step 4243\.0"):
        step_store(1, MINUTE)


def test_a_port_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _adopt(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]))
        with pytest.raises(
            UsageError, match=r"step 4242\.0 cannot meet at port .*; set MASTER_PORT"
        ):
            step_store(0, MINUTE)


def test_other_ranks_need_no_store_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KPREP_SLURM_STEP", raising=False)
    assert step_store(0, MINUTE) is None
    _adopt(monkeypatch, MASTER_ADDR="n1", TORCHELASTIC_USE_AGENT_STORE="True")  # --nproc in a task
    assert step_store(0, MINUTE) is None
