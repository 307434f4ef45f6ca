"""Links in a dataset of somebody else: read through, never written, deleted or walked in circles."""

import shutil
from pathlib import Path

import pytest
from conftest import run_kprep
from copy_datasets import convert, draw, files_of, plain

from prep.atomic_files import write_atomic
from prep.errors import StorageError
from prep.format import read_manifest
from prep.open_index import open_index
from prep.storage import Storage
from prep.verify import verify

AS_TRAIN = ("--profile", "small", "--short-side", "32", "--clips-per-shard", "5", "--workers", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("links")
    draw(folder / "videos", {"up": 3}, seed=1)
    draw(folder / "others", {"up": 2}, seed=2)
    convert(folder / "videos", folder / "root", "train")
    return folder


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder that is none of the dataset's."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "train-000000.tar").write_bytes(b"precious")
    (folder / ".x.1.tmp").write_bytes(b"precious too")
    return folder


def linked(made: Path, root: Path, name: str, target: Path) -> Path:
    """A copy of the dataset in which a folder is a link to another one."""
    shutil.copytree(made / "root", root)
    shutil.rmtree(root / name, ignore_errors=True)
    (root / name).symlink_to(target)
    return root


def test_a_dataset_whose_folders_and_root_are_links_is_read(made, tmp_path):
    root = Path(shutil.copytree(made / "root", tmp_path / "root"))
    for name in ("train", "index"):
        (root / name).rename(tmp_path / f"other-disk-{name}")
        (root / name).symlink_to(tmp_path / f"other-disk-{name}")
    (tmp_path / "name").symlink_to(root)
    storage = Storage(str(tmp_path / "name"))
    assert verify(storage, deep=True, workers=1).faults == []
    assert open_index(storage, read_manifest(storage), "train").num_rows == 3


def test_a_root_that_is_a_link_is_written(made, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    run_kprep("push", made / "root", tmp_path / "root")
    assert files_of(tmp_path / "disk") == files_of(made / "root")


def test_every_way_to_write_refuses_a_link(tmp_path, outside):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a/b").symlink_to(outside)
    before, storage = files_of(outside), Storage(str(root))
    whole = tmp_path / "whole"
    whole.write_bytes(b"new")
    for write in (
        lambda: storage.write("a/b/train-000000.tar", b"new"),
        lambda: storage.write("a/b/c/d", b"new"),
        lambda: storage.delete("a/b/train-000000.tar"),
        lambda: storage.move_in(whole, "a/b/train-000000.tar"),
        lambda: storage.local_target("a/b/new"),
    ):
        with pytest.raises(StorageError, match=r"a/b is a link, and kprep writes nothing through"):
            write()
    assert files_of(outside) == before
    assert storage.read("a/b/train-000000.tar") == b"precious"


def test_a_file_that_is_a_link_is_replaced_and_not_followed(tmp_path, outside):
    root = tmp_path / "root"
    root.mkdir()
    (root / "README.md").symlink_to(outside / "train-000000.tar")
    Storage(str(root)).write("README.md", b"new")
    assert (root / "README.md").read_bytes() == b"new"
    assert not (root / "README.md").is_symlink()
    assert (outside / "train-000000.tar").read_bytes() == b"precious"


def test_a_temporary_name_that_is_a_link_is_not_followed(tmp_path, outside, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 7)
    (tmp_path / ".new.7.tmp").symlink_to(outside / "train-000000.tar")
    write_atomic(tmp_path / "new", b"new")
    assert (tmp_path / "new").read_bytes() == b"new"
    assert (outside / "train-000000.tar").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("train", ("push", "{source}", "{root}")),
        ("val", ("shard", "{others}", "{root}", "--split", "val", *AS_TRAIN)),
        ("index", ("verify", "{root}", "--repair")),
        ("train", ("verify", "{root}", "--repair")),
        (".kprep-work", ("push", "{source}", "{root}")),
        (".kprep-work", ("shard", "{videos}", "{root}", "--split", "val", *AS_TRAIN)),
        (".kprep-work", ("subset", "{source}", "{new}")),
    ],
)
def test_a_command_writes_and_deletes_nothing_behind_a_link(made, tmp_path, outside, name, command):
    root, new = linked(made, tmp_path / "root", name, outside), tmp_path / "new"
    if name == "train":  # the tar is whole, so that only what stands beside it is written
        shutil.copyfile(made / "root/train/train-000000.tar", outside / "train-000000.tar")
    new.mkdir()
    (new / name).symlink_to(outside)
    before = files_of(outside)
    places = {"source": made / "root", "videos": made / "videos", "others": made / "others",
              "root": root, "new": new}  # fmt: skip
    done = run_kprep(*(part.format(**places) for part in command), check=False)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    link = (new if "{new}" in command else root) / name
    assert f"{link} is a link" in plain(done.stdout + done.stderr)
    assert files_of(outside) == before


def test_a_link_in_the_work_folder_is_refused(made, tmp_path, outside):
    root = tmp_path / "root"
    (root / ".kprep-work/train").mkdir(parents=True)
    (root / ".kprep-work/train/staged").symlink_to(outside)
    before = files_of(outside)
    done = run_kprep("shard", made / "videos", root, "--split", "train", check=False)
    assert done.returncode == 1
    assert "staged is a link, and" in plain(done.stderr)
    assert files_of(outside) == before


def test_a_link_to_a_folder_above_ends_in_one_sentence(made, tmp_path):
    for number, target in enumerate(("/", "..", ".")):
        root = Path(shutil.copytree(made / "root", tmp_path / f"root{number}"))
        (root / "train/up").symlink_to(target if target == "/" else root / target)
        done = run_kprep("verify", root, check=False)
        assert done.returncode == 1
        assert "is a link to a folder that holds the dataset itself" in plain(done.stderr)


@pytest.mark.parametrize(
    ("links", "why"),
    [
        ({"root/train/loop": "root/train"}, "leads back to itself"),
        ({"root/link": "other", "other/deep/back": "other"}, "leads back to itself"),
        ({"root/link": "other", "other/deep/back": "root"}, "holds the dataset itself"),
        ({"root/link": "other", "other/deep/back": "."}, "holds the dataset itself"),
        ({"root/train/self": "root/train/self"}, "leads back to itself"),
    ],
)
def test_a_link_that_leads_in_circles_is_named_wherever_it_lies(tmp_path, links, why):
    for folder in ("root/train", "other/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    last = Path([*links][-1])
    last = Path("root/link", *last.parts[1:]) if last.parts[0] == "other" else last
    with pytest.raises(StorageError) as refused:
        list(Storage(str(tmp_path / "root")).list())
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / last} is a link ")
    assert said.endswith(f"{why}; remove the link")


def test_links_that_end_somewhere_are_followed_and_those_to_nothing_are_none(tmp_path):
    for folder in ("root/train", "other"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "other/a.tar").write_bytes(b"a")
    for name in ("one", "train/two"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "other")
    (tmp_path / "root/nothing").symlink_to(tmp_path / "nowhere")
    found = [info.path for info in Storage(str(tmp_path / "root")).list()]
    assert found == ["one/a.tar", "train/two/a.tar"]


@pytest.mark.parametrize("root", ["none", "file"])
def test_what_is_no_directory_cannot_be_listed(tmp_path, root):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=f"{root} is not a directory"):
        list(Storage(str(tmp_path / root)).list())
