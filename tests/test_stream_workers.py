"""The processes that the loader's fork server starts, and what it leaves as it is."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from types import SimpleNamespace

import pytest

from prep.errors import KprepError, UsageError
from stream.fork_server import _Server, blocked
from stream.workers import made_by_workers, stop_workers

_SCRIPT = """
import gc, json, multiprocessing, os, signal, sys
from multiprocessing import resource_tracker
from stream.workers import fork_server_context

def report(sender):
    sender.send({
        "frozen": gc.get_freeze_count(), "collects": gc.isenabled(),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "hang-up": signal.getsignal(signal.SIGHUP),
        "environment": os.environ.get("PYTHONSAFEPATH"), "preload": "colorsys" in sys.modules,
    })

if __name__ == "__main__":
    multiprocessing.set_forkserver_preload(["colorsys"])
    for context in fork_server_context(), multiprocessing.get_context("forkserver"):
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=report, args=(sender,))
        worker.start()
        print(json.dumps(receiver.recv()))
        worker.join()
    with open(f"/proc/{resource_tracker._resource_tracker._pid}/status") as status:
        blocked = dict(line.split(":") for line in status)["SigBlk"]
    print(json.dumps({
        "frozen": gc.get_freeze_count(), "hang-up": signal.getsignal(signal.SIGHUP),
        "tracker hears it": not int(blocked, 16) & 1,
    }))
"""

# The server starts no torch here: that it runs is all that is asked
_FROM_STANDARD_INPUT = """
import os, sys
from stream import fork_server

def run(text):
    worker = fork_server.running_server_context().Process(target=print, args=(text,))
    worker.start()
    worker.join()

fork_server._PRELOAD.clear()
run("a worker")
child = os.fork()
run("the child's worker" if child == 0 else "the parent's worker")
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> list:
    """What a worker, a process of the user's own fork server, and the script say of themselves.

    The script is run where files are that have the names of ours: a server is `python -c`, which
    looks for modules in the current directory first.
    """
    script, here = (tmp_path_factory.mktemp("workers") / name for name in ("script.py", "here"))
    script.write_text(_SCRIPT)
    here.mkdir()
    for name in ("stream", "prep"):
        (here / f"{name}.py").write_text("raise SystemExit('executed')\n")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=here, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_workers_do_not_collect_what_they_share(reports):
    """torch alone has more than a hundred thousand objects; the script's own process keeps them."""
    worker, _, script = reports
    assert worker["frozen"] > 100_000
    assert worker["collects"]
    assert script["frozen"] == gc.get_freeze_count() == 0


def test_signals_of_a_terminal_are_for_the_process_that_stops_the_workers(reports):
    assert reports[0]["blocked"] == [1, 2]
    assert not reports[2]["tracker hears it"]  # its end would be an error of the workers


def test_the_users_own_fork_server_is_as_it_would_be_without_ours(reports):
    assert reports[1] == {
        "frozen": 0, "collects": True, "blocked": [], "hang-up": reports[2]["hang-up"],
        "environment": None, "preload": True,
    }  # fmt: skip


def test_a_script_from_standard_input_and_a_forked_child_have_workers():
    done = subprocess.run(
        [sys.executable, "-"], input=_FROM_STANDARD_INPUT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == ["a worker", "the child's worker", "the parent's worker"]  # fmt: skip


def test_a_signal_within_a_block_is_not_lost():
    """It is for this process, and comes behind the block, or at once to another of its threads."""
    heard: list[int] = []
    before = signal.signal(signal.SIGHUP, lambda number, _: heard.append(number))
    try:
        with blocked(signal.SIGHUP):
            os.kill(os.getpid(), signal.SIGHUP)
        assert heard == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_threads_start_one_server_after_the_other(monkeypatch):
    """The environment is the whole process's: two starts at once would take it from each other."""
    under_way = []

    def start(_):
        under_way.append(os.environ["PYTHONSAFEPATH"])
        time.sleep(0.02)
        found.append(under_way.copy())
        under_way.pop()

    found: list[list[str]] = []
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(forkserver.ForkServer, "ensure_running", start)
    server = _Server()
    threads = [threading.Thread(target=server.ensure_running) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["1"]] * 3
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_forked_child_lets_go_of_its_parents_server():
    """The server ends when nobody holds its pipe any more."""
    reading, writing = os.pipe()
    server = _Server()
    server._forkserver_alive_fd = writing
    server.forget()
    assert os.read(reading, 1) == b""
    os.close(reading)


def test_a_server_that_somebody_else_waited_for_is_started_again(monkeypatch):
    started = []

    def start(server):
        started.append(server)

    monkeypatch.setattr(forkserver.ForkServer, "ensure_running", start)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    reading, writing = os.pipe()
    server = _Server()
    server._forkserver_pid, server._forkserver_alive_fd = ended.pid, writing
    server.ensure_running()
    assert (started, server._forkserver_pid) == ([server], None)
    assert os.read(reading, 1) == b""  # its pipe is closed
    os.close(reading)


class _Loader:
    """torch's, whose workers died while nobody asked for a batch, or one that cannot begin."""

    def __init__(self, code: int | None) -> None:
        self._iterator = SimpleNamespace(_workers=[SimpleNamespace(exitcode=code)])

    def __iter__(self):
        raise RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")


@pytest.mark.parametrize(("code", "kind", "message"), [
    (-9, KprepError, "a worker of the loader was killed by signal 9"),
    (1, KprepError, "a worker of the loader ended with exit code 1"),
    (78, UsageError, "the loader's workers import your script"),
    (None, KprepError, "a worker of the loader ended"),
])  # fmt: skip
def test_workers_that_ended_before_an_iteration_are_one_sentence_too(code, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        next(made_by_workers(_Loader(code)))


def test_nobody_waits_for_workers_that_are_stopped():
    waits, stopped = threading.Event(), threading.Event()

    def stop():
        waits.wait(60)
        stopped.set()

    stop_workers(SimpleNamespace(_iterator=SimpleNamespace(_shutdown_workers=stop)))
    assert not stopped.is_set()
    waits.set()
    assert stopped.wait(60)
    stop_workers(SimpleNamespace(_iterator=None))
