"""What holds for the project as a whole: the direction of imports, no torch in prep, the wheel."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_kprep

PACKAGES = ("prep", "stream", "train")
MODULES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
# one direction: train -> stream -> prep.{format, storage, errors, text}; train writes files too
ALLOWED = {
    "prep": ("prep",),
    "stream": ("stream", "prep.format", "prep.storage", "prep.errors", "prep.text"),
    "train": (
        "train",
        "stream",
        "prep.format",
        "prep.storage",
        "prep.errors",
        "prep.write_errors",
        "prep.text",
    ),
}

UNPICKLING = ("load", "loads", "Unpickler")
UNSAFE_FROM = {"pickle": (*UNPICKLING, "*"), "os": ("system", "popen", "*")}
UNSAFE_NAMES = {*(f"pickle.{name}" for name in UNPICKLING), "os.system", "os.popen"}


def imports(path: Path):
    """Every module that a file imports, at any depth of nesting, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: imports are absolute"
            if node.module in PACKAGES:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_imports_go_one_way(path):
    package = path.relative_to(REPOSITORY).parts[0]
    for line, name in imports(path):
        head = name.split(".")[0]
        if head in PACKAGES:
            allowed = any(name == root or name.startswith(f"{root}.") for root in ALLOWED[package])
            assert allowed, f"{path.name}:{line} imports {name}, which {package} must not"
        if package == "prep":
            assert head not in ("torch", "torchvision"), (
                f"{path.name}:{line}: prep works without torch"
            )


def test_how_text_is_shown_needs_nothing_else():
    """A leaf: who imports it imports no library and nothing of a conversion with it."""
    for path in (REPOSITORY / "prep" / "text").glob("*.py"):
        for line, name in imports(path):
            own = name == "prep.text" or name.startswith("prep.text.")
            known = name.split(".")[0] in sys.stdlib_module_names
            assert own or known, f"{path.name}:{line} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_function_is_over_100_lines(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 100, f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path):
    assert unsafe(path.read_text()) == []


def unsafe(source: str) -> list[str]:
    """Return each call and import of a source that runs code or commands out of data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in UNSAFE_FROM:
            names = UNSAFE_FROM[node.module]
            found += [alias.name for alias in node.names if alias.name in names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_NAMES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            loads = name == "torch.load" and given.get("weights_only") != "True"
            pickles = given.get("allow_pickle", "False") != "False"
            shell = given.get("shell", "False") != "False"
            if name in ("eval", "exec") or loads or pickles or shell:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "os.popen('ls')",
        "from os import popen",
        "pickle.load(file)",
        "read = pickle.loads",
        "pickle.Unpickler(file).load()",
        "from pickle import loads",
        "from pickle import *",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_what_is_unsafe_is_noticed(source):
    assert len(unsafe(source)) == 1


def test_prep_imports_neither_stream_nor_train_nor_torch_when_it_runs():
    code = "import prep.shard, prep.verify, prep.info, prep.demo, prep.shard_command, prep.encode, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "stream", "train", "webdataset"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        # what a conversion does before the first clip is encoded, and its tar writer
        ("prep.shard_command, prep.shard", {"pyarrow", "numpy", "av", "obstore", "ssl"}),
        ("prep.encode", {"pyarrow", "numpy", "obstore", "ssl"}),
        ("prep.assemble", {"pyarrow", "numpy", "av", "obstore", "ssl", "webdataset"}),
    ],
)
def test_a_conversion_starts_without_what_it_does_not_need_yet(module, absent):
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not absent & set(done.stdout.split())


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom prep.cli import main\nsys.argv = ['kprep', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\nprint(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "numpy", "pyarrow", "av", "obstore", "rich"} & set(done.stdout.split())


def test_a_conversion_of_a_folder_imports_no_decoder_and_no_http():
    """Its workers do the decoding; each of these takes as much CPU time as some clips."""
    code = "import prep.shard_command, sys; print(*sys.modules); import prep.shard; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    before_the_workers_start, in_all = (set(line.split()) for line in done.stdout.splitlines())
    assert not {"numpy", "pyarrow"} & before_the_workers_start
    assert not {"av", "urllib3", "pyarrow.compute", "yt_dlp"} & in_all


def test_every_command_has_help_and_stands_in_the_guide():
    from prep.cli import COMMANDS

    guide = (REPOSITORY / "docs" / "guide.md").read_text()
    for name in COMMANDS:
        text = run_kprep(name, "--help").stdout
        assert f"kprep {name}" in text
        assert max(map(len, text.splitlines())) <= 80
        assert "\\b" not in text  # a raw docstring would show click's mark
        assert f"kprep {name}" in guide


def test_the_citation_is_of_this_version():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    cited = dict(
        re.findall(
            r"^(title|version|license): (.*)$",
            (REPOSITORY / "CITATION.cff").read_text(),
            re.MULTILINE,
        )
    )
    assert cited == {
        "title": project["name"],
        "version": project["version"],
        "license": project["license"],
    }


def test_no_document_is_cited_that_the_repository_does_not_have():
    for folder in (*PACKAGES, "tests", "benchmarks", "docs"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".toml") and path != Path(__file__):
                assert not re.search(r"shared/[A-Z]|\b(FACTS|DESIGN)\b", path.read_text()), path


def test_no_machine_and_no_registry_in_the_project():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.split():
        text = (
            (REPOSITORY / name).read_text(errors="replace") if (REPOSITORY / name).exists() else ""
        )
        for word in ("/" + "work/main", "/" + "root/", "pypi" + ".org/simple"):
            assert word not in text, f"{name} holds {word}"


@pytest.fixture(scope="session")
def fresh_environment(tmp_path_factory) -> Path:
    """A new environment with the built wheel and its base dependencies only: no torch."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)],
        check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    wheel = next(folder.glob("*.whl"))
    venv.create(folder / "venv", with_pip=True)
    subprocess.run(
        [folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--constraint",
         REPOSITORY / "constraints.txt", str(wheel)], check=True, timeout=600, cwd=folder,
    )  # fmt: skip
    return folder / "venv"


@pytest.mark.slow
def test_the_wheel_works_away_from_the_repository_and_without_torch(
    fresh_environment, motion_videos, tmp_path
):
    """`pip install kprep` alone converts, verifies and shows; it says what training needs."""
    kprep = fresh_environment / "bin" / "kprep"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments, code=0):
        done = subprocess.run([kprep, *map(str, arguments)], capture_output=True, text=True, timeout=300,
                              cwd=tmp_path, env=clean, check=False)  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    python = fresh_environment / "bin" / "python"
    assert (
        subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode
        == 1
    )
    assert "shard" in run("--help")
    run("shard", motion_videos, "data", "--split", "val", "--profile", "small", "--limit", 4)
    run("verify", "data")
    assert "4 clips" in run("info", "data")
    assert "4 clips" in run("report", "data", "page.html")
    assert "pip install 'kprep[train]'" in run(
        "train", "--data", "data", "--recipe", "tiny", code=2
    )
    assert "needs torch" in run("demo", "demo", code=2)
    assert not (tmp_path / "demo").exists()
    assert "needs torch" in run("bench", "decode", "data", code=2)
    for name in ("stream.clip_loader", "train.build_model"):
        code = f"import {name.split('.')[0]}\ntry: {name}\nexcept ImportError as e: print(e)"
        said = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True,
                              cwd=tmp_path, env=clean).stdout  # fmt: skip
        assert said == f"{name} needs torch and torchvision; pip install 'kprep[train]'\n"
    code = (
        "import importlib.util, pathlib\n"
        "for name in ('prep', 'stream', 'train'):\n"
        "    folder = pathlib.Path(importlib.util.find_spec(name).origin).parent\n"
        "    assert (folder / 'py.typed').exists(), name\n"
        "assert sorted((folder / 'recipes').glob('*.toml'))\n"
    )
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path, env=clean)


def test_files_are_opened_for_reading_in_one_way():
    """PyAV's own arguments differ from version to version, and metadata may be in any encoding."""
    opening = [
        path.relative_to(REPOSITORY).as_posix()
        for package in ("prep", "stream", "train")
        for path in sorted((REPOSITORY / package).rglob("*.py"))
        if "av.open(" in path.read_text()
    ]
    assert opening == ["prep/demo_videos.py", "prep/format/containers.py"]  # the first one writes
