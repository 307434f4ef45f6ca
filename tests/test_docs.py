"""The documentation is true: commands, examples, error messages, links, and it builds."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import click
import numpy as np
import pytest
from conftest import REPOSITORY, run_kprep
from docs_examples import Example, Page, read_page, replaced

from prep.cli import COMMANDS, kprep
from prep.demo_videos import draw_class_folders, random_motion, write_video

if TYPE_CHECKING:
    from pathlib import Path

DOCS = REPOSITORY / "docs"
GENERATED = ("commands.md", "conformance.md")
FILES = sorted(path for path in DOCS.rglob("*.md") if path.name not in GENERATED)
PAGES = {path.relative_to(REPOSITORY).as_posix(): path for path in (REPOSITORY / "README.md", *FILES)}  # fmt: skip
READ = {name: read_page(path, name) for name, path in PAGES.items()}
WITH_EXAMPLES = {
    name: page
    for name, page in READ.items()
    if any(not (example.reason or example.is_synopsis) for example in page.examples)
}


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
ALL += read_page(DOCS / "commands.md", "docs/commands.md").examples  # those of --help


@pytest.mark.parametrize("example", ALL, ids=lambda example: example.where)
def test_examples_are_well_formed(example):
    """Also those that are not run: options exist, Python compiles, TOML parses, make has the target."""
    if example.language == "python":
        ast.parse(example.text)
    elif example.language == "toml":
        tomllib.loads(example.text)
    elif example.is_synopsis:
        for line in example.text.splitlines():
            check_synopsis(line, example.where)
    else:
        for words in example.commands():
            check_command(words, example)


def check_command(words: list[str], example: Example) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"{example.where}: make has no {words[1]}"
    elif words[:2] == ["pip", "install"]:
        check_extras(words[2:], example)
    elif "kprep" in words:  # also behind torchrun, srun or variables
        check_kprep(words[words.index("kprep") :], example.where)


def check_extras(names: list[str], example: Example) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for name in names:
        found = re.fullmatch(r"kprep(\[(.+)\])?", name)
        assert found or example.reason, f"{example.where}: {name} is not ours; say why it is needed"
        for extra in (found[2] or "").split(",") if found else ():
            assert not extra or extra in project["optional-dependencies"], f"{example.where}: {extra}"  # fmt: skip


def test_every_reason_is_a_reason():
    for page in READ.values():
        for example in page.examples:
            assert example.reason is None or len(example.reason.split()) >= 3, example.where


class World:
    """What the pages' examples find in their working directory; made once, copied for each page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw_class_folders(folder / "videos" / "train", 24, seed=1)
        draw_class_folders(folder / "videos" / "val", 8, seed=2)
        self._draw_kinetics()
        self._write_tars()
        for split in ("train", "val"):
            run_kprep("shard", folder / "videos", folder / "dataset", "--split", split,
                      "--profile", "small", "--clips-per-shard", 10)  # fmt: skip

    def _draw_kinetics(self) -> None:
        """Clips named as Kinetics' are, with an official-looking list: k400/val and val.csv."""
        rows = ["label,youtube_id,time_start,time_end,split,is_cc"]
        draw_class_folders(self.folder / "drawn", 8, seed=3)
        for number, path in enumerate(sorted((self.folder / "drawn").rglob("*.*"))):
            name = f"clip{number:07d}"
            rows.append(f"{path.parent.name},{name},{number},{number + 1},val,0")
            target = self.folder / "k400" / "val" / f"{name}_{number:06d}_{number + 1:06d}.mp4"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        (self.folder / "val.csv").write_text("\n".join(rows) + "\n")

    def _write_tars(self) -> None:
        """Tars as video2dataset writes them: tars/00000.tar with .mp4, .txt and .json members."""
        random = np.random.default_rng(4)
        drawn = self.folder / "drawn.mp4"
        for shard in range(2):
            target = self.folder / "tars" / f"{shard:05d}.tar"
            target.parent.mkdir(exist_ok=True)
            with tarfile.open(target, "w") as tar:
                for number in range(4):
                    direction = ("left", "up")[number % 2]
                    write_video(drawn, random_motion(direction, random), "libx264")
                    key = f"{shard:05d}{number:04d}"
                    texts = {"txt": direction.encode(), "json": json.dumps({"key": key}).encode()}
                    for extension, data in {"mp4": drawn.read_bytes(), **texts}.items():
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))

    def give(self, name: str, target: Path) -> None:
        """Copy a folder or a file into a page's working directory."""
        source = self.folder / name
        if source.is_dir():
            shutil.copytree(source, target / name)
        else:
            shutil.copy(source, target / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def run(words: list[str], folder: Path, where: str, environment: dict[str, str]) -> None:
    programs = {
        "kprep": [sys.executable, "-P", "-m", "prep"], "python": [sys.executable], "tar": ["tar"],
    }  # fmt: skip
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words[0].partition("=")
        environment, words = {**environment, name: value}, words[1:]
    assert words[0] in programs, f"{where}: {words[0]} cannot be run here; mark the block `not run`"
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*programs[words[0]], *words[1:]], cwd=folder, capture_output=True, text=True, timeout=300,
        check=False, stdin=subprocess.DEVNULL, env={**os.environ, **environment, "PYTHONPATH": path},
    )  # fmt: skip
    assert not done.returncode, (
        f"{where}: {words} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )


def run_example(example: Example, page: Page, folder: Path, environment: dict[str, str]) -> None:
    text = replaced(example.text, page)
    if example.language == "python":
        script = folder / f"example_{example.line}.py"
        script.write_text(text)
        run(["python", script.name], folder, example.where, environment)
    elif example.language == "sh":
        shell = Example(example.page, example.line, "sh", text, None)
        for words in shell.commands():
            if words[0] not in ("make", "pip"):  # checked above
                run(words, folder, example.where, environment)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name, world, tmp_path, request):
    page, environment = WITH_EXAMPLES[name], {}
    for given in page.given:
        if given == "bucket":
            s3 = request.getfixturevalue("s3")
            s3.upload(world.folder / "dataset", "k400")
            environment = s3.environment
        else:
            world.give(given, tmp_path)
    for example in page.examples:
        if example.reason is None and not example.is_synopsis:
            run_example(example, page, tmp_path, environment)


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
def test_the_reference_has_every_public_name(site):
    import prep.format
    import stream
    import train

    text = (site / "api.html").read_text()
    for package in (stream, train, prep.format):
        for name in package.__all__:
            assert f">{name}<" in text, f"{package.__name__}.{name} is not in docs/api.md"
