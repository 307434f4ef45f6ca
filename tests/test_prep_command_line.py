"""What the command line itself bears: closed streams, readers that leave, signals, limits."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY

KPREP = f'"{sys.executable}" -P -m prep'


def shell(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", script, *map(str, arguments)], capture_output=True, text=True,
                          timeout=120, check=False, env={**os.environ, **environment})  # fmt: skip


def test_output_that_the_caller_has_closed_is_done_without(motion_dataset, tmp_path):
    page = tmp_path / "page.html"
    done = shell(f'{KPREP} verify "$0" >&- 2>&- && {KPREP} report "$0" "$1" --samples 1 2>&-',
                 motion_dataset, page)  # fmt: skip
    assert (done.returncode, page.exists()) == (0, True)


def test_output_that_nobody_reads_is_a_failure_without_a_word(motion_dataset):
    done = shell(f'{KPREP} info "$0" | true; echo ${{PIPESTATUS[0]}}', motion_dataset)
    assert (done.stdout, done.stderr) == ("1\n", "")


@pytest.mark.parametrize("words", ["info", "verify", "info --csv -"])
def test_output_without_room_is_named(motion_dataset, words):
    command, *options = words.split()
    done = shell(f'{KPREP} {command} "$0" {" ".join(options)} > /dev/full', motion_dataset)
    said = "Error: standard output cannot be written (No space left on device); send it elsewhere, "
    assert (done.returncode, done.stderr) == (1, f"{said}then run the same command again\n")


def test_a_place_that_can_only_be_read_is_named(motion_dataset, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    if shell('mount -t tmpfs -o size=20m none "$0"', place).returncode:
        pytest.skip("only root can mount")
    try:
        shutil.copytree(motion_dataset, place / "root")
        (place / "root/classes.txt").unlink()  # to be repaired
        shell('mount -o remount,ro "$0"', place)
        commands = {
            "verify root --repair": "root/.kprep-work/lock",
            f"merge root/new {motion_dataset}": "root/new",
            f"pull {motion_dataset} new": "new",
            "shard root/train root --split test --profile small": "root/.kprep-work/test.lock",
        }
        for command, path in commands.items():
            done = shell(f'cd "$0"; {KPREP} {command}', place, PYTHONPATH=str(REPOSITORY))
            said = f"{place / path} cannot be written: Read-only file system; give another path"
            assert (done.returncode, said in done.stderr) == (2, True), (command, done.stderr)
    finally:
        shell('umount "$0"', place)


# A command within which a signal comes, while it has a temporary folder
SIGNALLED = """
import os, signal, sys, time
import prep.verify
def run_here(*_):
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        pass  # as where pyarrow imports something
    print("lives on")
    return []
number = int(sys.argv.pop(1))
prep.verify.run_here = run_here
from prep.cli import main
main()
"""


@pytest.mark.usefixtures("heard_hangups")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_temporary_folder(motion_dataset, tmp_path, number):
    words = [sys.executable, "-P", "-c", SIGNALLED, str(int(number)), "verify", str(motion_dataset)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False,
                          env={**os.environ, "TMPDIR": str(tmp_path)})  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")
    assert not list(tmp_path.glob("kprep-verify-*"))


def test_a_hang_up_that_is_ignored_stays_ignored(motion_dataset):
    done = shell('trap "" HUP; exec "$0" -P -c "$1" 1 verify "$2"', sys.executable, SIGNALLED, motion_dataset)  # fmt: skip
    assert "lives on" in done.stdout


STARVED = """
import sys
import prep.verify
def run_here(*_):
    raise {error}
prep.verify.run_here = run_here
from prep.cli import main
main()
"""


@pytest.mark.parametrize(
    "error",
    ["MemoryError", "RuntimeError(\"can't start new thread\")", "OSError(12, 'Cannot allocate memory')",
     "ImportError('libarrow.so: failed to map segment from shared object')"],
)  # fmt: skip
def test_want_of_memory_is_one_sentence(motion_dataset, error):
    words = [sys.executable, "-P", "-c", STARVED.format(error=error), "verify", str(motion_dataset)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: out of memory, threads or address space; use fewer")
    assert done.stderr.count("\n") == 1
