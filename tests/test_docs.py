"""The documentation is true: commands, examples, error messages, links, and it builds."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import click
import pytest
from conftest import REPOSITORY, run_kprep
from docs_examples import Example, has_placeholder, read_page
from docs_world import Typist, World, end_servers, world

from prep.cli import COMMANDS, kprep

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCS = REPOSITORY / "docs"
FILES = sorted(DOCS.rglob("*.md"))
PAGES = {path.relative_to(REPOSITORY).as_posix(): path for path in (REPOSITORY / "README.md", *FILES)}  # fmt: skip
READ = {name: read_page(path, name) for name, path in PAGES.items()}


# -- the command line ----------------------------------------------------------------------------


def test_the_page_of_all_commands_is_up_to_date():
    sys.path.insert(0, str(DOCS / "tools"))
    try:
        import commands
    finally:
        sys.path.pop(0)
    assert commands.PAGE.read_text() == commands.page(), (
        "docs/commands.md is not what --help says; run `make docs-pages` and commit it"
    )


def command_and_options(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """Follow `kprep [--debug] NAME [NAME]` down to the command."""
    context = click.Context(kprep, info_name="kprep")
    command: click.Command = kprep
    rest = words[1:]
    while isinstance(command, click.Group):
        while rest and rest[0] == "--debug":
            rest = rest[1:]
        assert rest, f"{words}: a command is missing"
        inner = command.get_command(context, rest[0])
        assert inner is not None, f"{words}: there is no command {rest[0]}"
        command, context, rest = inner, click.Context(inner, context, rest[0]), rest[1:]
    return command, context, rest


def check_kprep(words: list[str], where: str) -> None:
    """Fail when an option does not exist or lacks its value."""
    if words[1:] in (["--help"], ["--version"]):
        return
    command, context, rest = command_and_options(words)
    if rest == ["--help"]:
        return
    try:
        command.make_parser(context).parse_args(list(rest))
    except click.UsageError as error:
        raise AssertionError(f"{where}: {words}: {error.message}") from error


def check_synopsis(line: str, where: str) -> None:
    """`kprep NAME ARGUMENT [--option VALUE]`: the command exists, and has the options."""
    words = [word for word in line.split() if word not in ("[OPTIONS]", "COMMAND", "[ARGS]...")]
    command, _, _ = command_and_options(words) if len(words) > 2 else (kprep, None, None)
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", line):
        assert option in known, f"{where}: `{command.name}` has no {option}"


def test_the_guide_has_a_section_for_every_command():
    guide = (DOCS / "guide.md").read_text()
    headings = " ".join(re.findall(r"^## (.*)$", guide, re.MULTILINE))
    missing = [name for name in COMMANDS if not re.search(rf"kprep {name}\b", headings)]
    assert not missing, f"docs/guide.md has no section `## kprep NAME` for {missing}"


def test_every_option_is_found_in_the_docs():
    """Holds by the generated page; this test would notice if the generator left one out."""
    text = (DOCS / "commands.md").read_text()
    for name in COMMANDS:
        for found in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", run_kprep(name, "--help").stdout):
            assert found in text, f"{name} {found}"


# -- examples ------------------------------------------------------------------------------------


ALL = [example for page in READ.values() for example in page.examples]
INSTALLS = "installs from the package index; tests/test_project.py installs the wheel"
TESTS = "is what runs the tests"
READERS = "is a part of tests/other_readers.py, which tests/test_readers.py runs"
SLURM = "needs a SLURM cluster"
WEIGHTS = "downloads weights; tests/test_train_check_weights.py has a stand-in for them"
CHECK_WEIGHTS = "kprep train --data k400 --check-weights R2Plus1D_18_Weights.KINETICS400_V1"
SLURM_SHARD = (
    "kprep shard /videos/k400 /data/k400 --split train --annotations train.csv "
    "--engine dask --scheduler tcp://login1:8786"
)
# Examples that are only parsed: a command as it stands, or a line of a longer block, and why.
ONLY_PARSED = {
    ("README.md", "make demo"): f"{INSTALLS}, docs/commands.md runs `kprep demo`",
    ("README.md", "make test"): TESTS,
    ("README.md", "pip install ."): INSTALLS,
    ("README.md", "pip install '.[train]'"): INSTALLS,
    ("docs/index.md", "pip install ."): INSTALLS,
    ("docs/index.md", "pip install '.[train]'"): INSTALLS,
    ("docs/tutorial.md", "pip install '.[train]'"): INSTALLS,
    **{("docs/conformance.md", f"def read_{name}(root: str, split: str) -> Iterator[Clip]:"): READERS
       for name in ("kprep", "webdataset", "wids", "energon", "datasets")},
    ("docs/format.md", "def read_dataset(root):"): "tests/test_format_reader.py runs it, without site-packages",
    ("docs/howto/slurm.md", "from dask_jobqueue import SLURMCluster"): SLURM,
    ("docs/howto/slurm.md", SLURM_SHARD): f"{SLURM}; the same is run on a cluster on one machine",
    ("docs/howto/slurm.md", "#SBATCH --signal=USR1@120 --requeue --open-mode=append"): SLURM,
    ("docs/training.md", CHECK_WEIGHTS): WEIGHTS,
    ("docs/training.md", f"{CHECK_WEIGHTS} --nproc 8"): WEIGHTS,
    ("docs/commands.md", CHECK_WEIGHTS): WEIGHTS,
}  # fmt: skip


def reasons(example: Example, part: str) -> list[tuple[str, str]]:
    """The rows of ONLY_PARSED that hold for a part of an example."""
    lines = part.splitlines()
    return [(page, line) for page, line in ONLY_PARSED if page == example.page and line in lines]


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.where)
def test_examples_are_well_formed(example, tmp_path):
    """Also those that are not run: options exist, code compiles, make has the target."""
    if example.language == "python":
        ast.parse(example.text)
    elif example.language == "toml":
        tomllib.loads(example.text)
    elif example.is_synopsis:
        for line in example.parts():
            check_synopsis(line, example.where)
    elif example.is_script:
        script = tmp_path / "script"
        script.write_text(example.text)
        subprocess.run(["/bin/bash", "-n", script], check=True, timeout=60)
        for command in re.findall(r"\bkprep .*", example.text):
            check_kprep(command.split(), example.where)
    else:
        for part in example.parts():
            check_command(shlex.split(part), example)


def check_command(words: list[str], example: Example) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"{example.where}: make has no {words[1]}"
    elif words[:2] == ["pip", "install"]:
        check_extras(words[2:], example)
    elif "kprep" in words:  # also behind variables
        check_kprep(words[words.index("kprep") :], example.where)


def check_extras(names: list[str], example: Example) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for name in names:
        found = re.fullmatch(r"(?:kprep|\.)(\[(.+)\])?", name)
        assert found, f"{example.where}: {name} is not ours; say in a sentence why it is needed"
        for extra in (found[2] or "").split(","):
            assert not extra or extra in project["optional-dependencies"], f"{example.where}: {extra}"  # fmt: skip


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.where)
def test_a_synopsis_is_none_that_could_be_typed(example):
    """Each of its lines has a placeholder; otherwise it is an example, and belongs into a block that is run."""
    if example.is_synopsis:
        for line in example.parts():
            assert has_placeholder(line), f"{example.where}: {line}"


def test_every_command_in_the_text_exists():
    """`kprep NAME --option …` between words, where nobody would run it."""
    for name, page in PAGES.items():
        prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for command in re.findall(r"`(kprep [a-z][^`\n\\]*)`", prose):
            check_synopsis(re.sub(r"\[-\[]", " ", command), name)


def test_what_is_only_parsed_is_what_the_table_says():
    """So a row that holds for nothing is found here; all that is not in it is run by the next test."""
    found = [row for example in ALL for part in example.parts() for row in reasons(example, part)]
    assert sorted(found) == sorted(ONLY_PARSED)


@pytest.fixture(scope="module")
def given_world(tmp_path_factory, s3) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world"), s3) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, page in READ.items() if any(not one.is_synopsis for one in page.examples)]
)  # fmt: skip
def test_examples_run(name, given_world, tmp_path):
    page = READ[name]
    for wanted in page.given:
        given_world.give(wanted, tmp_path)
    typist = Typist(page, tmp_path, given_world)
    try:
        for example in page.examples:
            for part in () if example.is_synopsis else example.parts():
                if not reasons(example, part):
                    typist.take(example, part)
    finally:
        typist.leave()


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(3600)
"""


def test_a_server_that_does_not_end_by_itself_is_killed():
    command = [sys.executable, "-c", STUBBORN]
    server = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert server.stdout is not None
    with server.stdout:
        assert server.stdout.readline() == b"ready\n"
    end_servers([server], patience_seconds=0.1)
    assert server.returncode == -signal.SIGKILL


# -- error messages ------------------------------------------------------------------------------


def literals() -> set[str]:
    """Every string of the code, with … where something is put in; neighbours joined as Python does."""
    found = set()
    for package in ("prep", "stream", "train"):
        for path in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # fmt: skip
                    found.add("".join(map(str, parts)))
    return found


def test_every_message_of_the_troubleshooting_page_is_one_of_ours():
    text = (DOCS / "howto" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(messages) > 20
    ours = literals()
    for message in messages:
        parts = [part for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in ours), f"no code says: {message}"


# -- numbers -------------------------------------------------------------------------------------


def test_what_a_kinetics_takes_follows_from_what_was_measured():
    """The table of docs/before.md is computed from that page's clips and docs/performance.md."""
    measured = (DOCS / "performance.md").read_text()
    kilobytes = [
        float(
            re.search(
                rf"\| \*\*{name}, veryfast\*\* \| \*\*16\*\* \| \*\*fastdecode\*\* \| \*\*23\*\* \| \*\*([\d.]+)",
                measured,
            )[1]
        )
        for name in ("small", "general")
    ]
    seconds = float(re.search(r"\| kprep shard \| [^|]+ \| ([\d.]+) ", measured)[1])
    rows = re.findall(r"^\| (Kinetics-.*) \|$", (DOCS / "before.md").read_text(), re.MULTILINE)
    training = (240_258, 427_549, 534_073)
    for row, videos in zip(rows, training, strict=True):
        _, _, clips, *found = row.split(" | ")
        number = int(clips.replace(",", ""))
        hours = [round(videos * 5 * 45 / rate / 3600) for rate in (1_486, 1_035)]
        assert found == [
            *(f"{number * size / 1e6:.0f} GB" for size in kilobytes),
            f"{number * seconds / 3600:.0f}", f"{hours[0]} ({hours[1]})",
        ], row  # fmt: skip
    assert "**1,486**" in measured
    assert "**1,035**" in measured


# -- the site ------------------------------------------------------------------------------------


class Requests(HTMLParser):
    """Collects what a page loads by itself: links that somebody must click are not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        loads = tag != "a" and not (tag == "link" and values.get("rel") in ("canonical", "next", "prev"))  # fmt: skip
        for name in ("src", "href"):
            if loads and (values.get(name) or "").startswith(("http:", "https:", "//")):
                self.found.append(str(values[name]))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` does: every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert not done.returncode, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_builds_and_asks_nobody_else(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(FILES)
    for page in pages:
        parser = Requests()
        parser.feed(page.read_text())
        assert not parser.found, f"{page.name} loads {parser.found}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text()), sheet.name


@pytest.mark.slow
def test_options_in_tables_can_be_copied(site):
    """`a\\|b` in a table's code is what GitHub needs; the site shows `a|b`."""
    for page in site.rglob("*.html"):
        codes = re.findall(r"<code>[^<]*</code>", page.read_text())
        assert not [code for code in codes if "\\|" in code], page.name
    assert "<code>--resume auto|PATH</code>" in (site / "training.html").read_text()


@pytest.mark.slow
def test_the_reference_has_every_public_name(site):
    import prep.format
    import stream
    import train

    text = (site / "api.html").read_text()
    for package in (stream, train, prep.format):
        for name in package.__all__:
            assert f">{name}<" in text, f"{package.__name__}.{name} is not in docs/api.md"
