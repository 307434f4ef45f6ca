"""What the command line itself bears: closed streams, readers that leave, signals, limits."""

from __future__ import annotations

import os
import subprocess
import sys

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
