"""The command line: parses, calls, prints. Commands are loaded when they are used."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from pathlib import Path

import click

from prep import __version__
from prep.errors import KprepError
from prep.lazy_group import NEEDS_TORCH, LazyGroup, torch_missing
from prep.temporary import remove_temporary_folders
from prep.write_errors import write_to_nowhere

# name: (module, attribute, one line for `kprep --help`). Modules that need torch are named here as
# strings only: prep never imports stream or train.
COMMANDS = {
    "shard": ("prep.shard_command", "shard_command", "Convert videos into clip shards."),
    "verify": ("prep.verify_command", "verify_command", "Check every file of a dataset."),
    "index": ("prep.index_command", "index_command", "Make somebody else's tars streamable."),
    "info": ("prep.info_command", "info_command", "Show what a dataset holds."),
    "report": ("prep.report_command", "report_command", "Write a page to look at a dataset with."),
    "push": ("prep.copy_command", "push_command", "Copy a dataset to a bucket, verified."),
    "pull": ("prep.copy_command", "pull_command", "Copy a dataset from a bucket, verified."),
    "merge": ("prep.merge_command", "merge_command", "Make one dataset of several."),
    "subset": ("prep.merge_command", "subset_command", "Make a smaller dataset of one."),
    "overlap": ("prep.overlap_command", "overlap_command", "Show what two lists share."),
    "train": ("train.cli", "train", "Train a video classification model on a dataset."),
    "export": (
        "train.export_command",
        "export_command",
        "Write a trained network for others.",
    ),
    "plan": (
        "stream.plan_command",
        "plan_command",
        "Simulate a training run before it is paid for.",
    ),
    "bench": (
        "prep.bench_command",
        "bench_group",
        "Measure how fast this machine converts, reads and trains.",
    ),
    "demo": ("prep.demo", "demo_command", "Show all of kprep on generated videos."),
}

# What libraries say where a limit gives them no memory or no thread
_STARVED = re.compile("can't start new thread|[Cc]annot allocate memory|failed to map segment")


@click.group(
    cls=LazyGroup, table=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="kprep")
@click.option("--debug", is_flag=True, help="Show tracebacks and the workers' messages.")
def kprep(debug: bool) -> None:
    """Kinetics to clip shards, exact streaming, and training.

    \b
    kprep shard videos/ dataset/ --split train --profile small
    kprep verify dataset/
    kprep train --data dataset/ --recipe resnet
    """
    if debug:
        os.environ["KPREP_DEBUG"] = "1"


def main() -> None:
    """Run the command line; a user's mistake or a failure is one sentence, never a traceback."""
    _open_streams()
    _end_on_signals()
    try:
        code = kprep.main(standalone_mode=False)
    except click.exceptions.Exit as exit_:
        code = exit_.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KprepError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if os.environ.get("KPREP_DEBUG"):
            raise
        code = _explain(error)
    sys.exit(code if isinstance(code, int) else 0)


class _Output(io.TextIOWrapper):
    """Standard output that remembers its failure, which an OSError alone does not tell from others.

    Python's own buffer is left as it was, for who has it.
    """

    failure: OSError | None = None

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.failure = error
            raise


def _open_streams() -> None:
    """Open standard output as ours, and the null device for what our caller has closed."""
    python_s = sys.__stdout__
    if python_s is not None and sys.stdout is python_s:
        sys.stdout = _Output(
            open(python_s.fileno(), "wb", closefd=False),  # noqa: SIM115
            encoding=python_s.encoding,
            errors=python_s.errors,
            line_buffering=python_s.line_buffering,
        )
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115


def _end_on_signals() -> None:
    """Let SIGTERM end the process without its temporary folders; SIGHUP is a SIGTERM.

    So a command that does something else on SIGTERM does it when its terminal goes, too. What the
    caller has us ignore, as nohup does, stays ignored. Nothing is raised: pyarrow, for one, goes on
    after an exception in the modules that it tries to import.
    """

    def end(number: int, _: object) -> None:
        remove_temporary_folders()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))


def _is_nowhere() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _is_of_output(error: OSError) -> bool:
    """Whether standard output failed; what waits in its buffer is tried once more."""
    if error.filename or not isinstance(sys.stdout, _Output):
        return False
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return sys.stdout.failure is not None


def _explain(error: Exception) -> int:
    """Print one sentence; return the exit code."""
    code = 1
    if isinstance(error, KprepError):
        text, code = str(error), error.exit_code
    elif isinstance(error, MemoryError) or _STARVED.search(str(error)):
        text = (
            "out of memory, threads or address space; use fewer processes, or raise the limit "
            "(ulimit -v, ulimit -u, or that of the job)"
        )
    elif isinstance(error, OSError) and _is_of_output(error):
        text = (
            f"standard output cannot be written ({error.strerror}); send it elsewhere, then run "
            "the same command again"
        )
        write_to_nowhere()  # else Python tries once more at its end, and says so
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}"
        if isinstance(error, FileNotFoundError) and not where and _is_nowhere():
            text = "the current directory has been removed; change to another one"
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in NEEDS_TORCH:
        text, code = torch_missing(sys.argv[1]), 2
    else:
        raise error
    click.echo(f"Error: {text}", err=True)
    return code
