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
