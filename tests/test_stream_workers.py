"""The processes that the loader's fork server starts."""

import gc
import subprocess
import sys

_SCRIPT = """
import gc
from stream.workers import fork_server_context

def report(sender):
    sender.send((gc.get_freeze_count(), gc.isenabled()))

if __name__ == "__main__":
    context = fork_server_context()
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=report, args=(sender,))
    worker.start()
    print(*receiver.recv(), gc.get_freeze_count())
    worker.join()
"""


def test_files_where_the_user_stands_are_not_taken_for_ours(tmp_path):
    """The server runs as `python -c`, which looks for modules in the current directory first."""
    script, here = tmp_path / "script.py", tmp_path / "here"
    script.write_text(_SCRIPT)
    here.mkdir()
    for name in ("stream", "prep"):
        (here / f"{name}.py").write_text("raise SystemExit('executed')\n")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=here, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_workers_do_not_collect_what_they_share(tmp_path):
    """torch alone has more than a hundred thousand objects; the script's own process keeps them."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120
    )
    frozen, is_enabled, own = done.stdout.split()
    assert int(frozen) > 100_000
    assert is_enabled == "True"
    assert int(own) == gc.get_freeze_count() == 0
