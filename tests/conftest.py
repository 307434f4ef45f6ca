"""What several tests share: real videos when they are there, and datasets made of generated ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from s3_server import S3Server, s3_server

from prep.demo_videos import draw_class_folders, write_broken_files

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parent.parent
CORPUS = REPOSITORY.parent / "shared" / "corpus"

# no test ends for being slow on a busy machine
hypothesis.settings.register_profile("kprep", deadline=None)
hypothesis.settings.load_profile("kprep")


@pytest.fixture
def heard_hangups() -> Iterator[None]:
    """Let the test's processes hear SIGHUP, also where nohup started the tests without it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def without(missing: str) -> None:
    """Skip the test for want of a tool or of data, named in a sentence; where CI=true, fail it."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of the GPU where there is none: no installation can bring one."""
    if not any(item.get_closest_marker("cuda") for item in items):
        return
    import torch  # here: two seconds that other files need not wait

    if torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The folder of real videos and lists."""
    if not CORPUS.is_dir():
        without("the corpus of real videos (../shared/corpus) is not on this machine")
    return CORPUS


def run_kprep(
    *arguments: object, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "prep", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    if check and done.returncode:
        raise AssertionError(
            f"kprep {arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
    return done


@pytest.fixture(scope="session")
def motion_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's videos: class folders below train/ and val/, three broken files among them."""
    folder = tmp_path_factory.mktemp("motion") / "videos"
    draw_class_folders(folder / "train", 160, seed=1)
    draw_class_folders(folder / "val", 40, seed=2)
    write_broken_files(folder / "train", seed=3)
    return folder


@pytest.fixture(scope="session")
def motion_dataset(request: pytest.FixtureRequest) -> Path:
    """The demo's dataset: splits train and val, four classes by direction of motion.

    KPREP_MOTION_DATASET names one that was made before, for a machine without ffmpeg.
    """
    if made := os.environ.get("KPREP_MOTION_DATASET"):
        return Path(made)
    motion_videos: Path = request.getfixturevalue("motion_videos")
    root = motion_videos.parent / "dataset"
    for split in ("train", "val"):
        run_kprep(
            "shard",
            motion_videos,
            root,
            "--split",
            split,
            "--profile",
            "small",
            "--clips-per-shard",
            64,
        )
    return root


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for a core that another process has make small work many times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with one bucket, for the tests of a file: idle it takes a seventh of a core."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def odd_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with something of everything to warn of, and class names that want to be markup."""
    import report_datasets

    return report_datasets.odd_dataset(tmp_path_factory.mktemp("odd"))
