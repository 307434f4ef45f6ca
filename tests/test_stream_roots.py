"""Several roots in one loader: labels by name, keys told apart, weights, exact resume, S3."""

import json
import shutil
from collections import Counter
from fractions import Fraction
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet
from stream_datasets import make_dataset, make_other_dataset, sequence
from test_stream_order_page import page

from prep.errors import (
    BadClipError,
    DatasetError,
    KprepError,
    ReplacedError,
    UsageError,
    error_to_text,
)
from prep.storage import Storage
from stream import BatchAddress, ClipStream, DataRoot, StreamOptions, clip_loader, pins
from stream.class_lists import join_class_lists
from stream.loader import _storages
from stream.roots import data_roots


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """11 clips of at least 16 frames at 15 fps, classes left and up; one is too short."""
    return make_dataset(tmp_path_factory.mktemp("first"), 12)


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """12 clips at 30 fps, classes Left, down and left; two have keys of the first root."""
    return make_other_dataset(tmp_path_factory.mktemp("second"))


def loader(*roots, **more):
    options = {"split": "train", "batch_size": 4, "seed": 3, "layout": "yuv420", **more}
    return clip_loader(list(roots), **options)


def labels(one) -> dict[str, int]:
    return {
        key: label
        for batch in one
        for key, label in zip(batch.key, batch.label.tolist(), strict=True)
    }


def test_empty_options_are_a_roots_own():
    assert DataRoot("a").options_or({"endpoint": "x"}) == {"endpoint": "x"}
    assert DataRoot("a", 1, {}).options_or({"endpoint": "x"}) == {}
    assert DataRoot("a", 1, {"region": "y"}).options_or({"endpoint": "x"}) == {"region": "y"}
    roots = [DataRoot("s3://a", 1, {}), DataRoot("s3://b")]
    with_endpoint = [
        "endpoint" in one.storage.options for one in _storages(roots, {"endpoint": "x"}, 1)
    ]
    assert with_endpoint == [False, True]


# -- what users write ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "root", "weight"),
    [
        ("k400", "k400", 1),
        ("k400@2", "k400", 2),
        ("s3://bucket/k400@0.25", "s3://bucket/k400", Fraction(1, 4)),
        ("s3://bucket/k@400", "s3://bucket/k", 400),  # a number behind the last @ is a weight
        ("https://user@host/clips", "https://user@host/clips", 1),
        ("https://user@host/clips@.5", "https://user@host/clips", Fraction(1, 2)),
        ("clips@2@1", "clips@2", 1),
        ("me@home/clips", "me@home/clips", 1),
        ("clips@v2", "clips@v2", 1),
        ("clips@1e3", "clips@1e3", 1),
        ("clips@-1", "clips@-1", 1),
        ("clips@", "clips@", 1),
    ],
)
def test_a_number_behind_the_last_at_is_the_weight(text, root, weight):
    assert DataRoot.parse(text) == DataRoot(root, weight)


@example("n" * 300, Fraction(2))  # longer than a file system takes
@given(st.text(), st.fractions(Fraction(1, 1000), 1000, max_denominator=1000))
def test_any_root_can_be_written_with_a_weight(root, weight):
    decimal = f"{float(weight):.12f}"
    if Fraction(decimal) and root:
        assert DataRoot.parse(f"{root}@{decimal}") == DataRoot(root, Fraction(decimal))


def test_a_directory_whose_name_looks_like_a_weight_is_not_mistaken(tmp_path):
    (tmp_path / "clips@2").mkdir()
    with pytest.raises(UsageError, match="clips@2@1' for the directory of that name"):
        DataRoot.parse(str(tmp_path / "clips@2"))
    (tmp_path / "clips").mkdir()
    assert DataRoot.parse(str(tmp_path / "clips@2")).weight == 2


@pytest.mark.parametrize("weight", [0, -1, "0", float("nan"), float("inf"), 1001, "much", None, "1e999", "1e99999999"])  # fmt: skip
def test_weights_of_no_use_are_refused(weight):
    with pytest.raises(UsageError, match=r"weight \(.*\) of k400 must be a number above 0"):
        DataRoot("k400", weight)


def test_weights_are_taken_as_they_are_written():
    assert [one.weight for one in data_roots([("a", 0.1), ("b", "0.30"), "c"])] == [
        Fraction(1, 10), Fraction(3, 10), 1,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ([], "empty list"),
        (["a", ("a/", 2)], "a is named twice"),
        (["a", ("./a", 2)], "a is named twice"),
        (["s3://b/a", "s3://b/a/"], "s3://b/a is named twice"),
        (b"a", "b'a'. must be one root or a list"),
        (["a", 3], "3 must be a root or a pair"),
        (3, "must be one root or a list"),
        ([b"a"], "b'a' must be a root or a pair"),
    ],
)
def test_lists_of_no_use_are_refused(given_, message):
    with pytest.raises(UsageError, match=message):
        data_roots(given_)


@pytest.mark.parametrize("root", [None, b"ds", 3])
def test_a_root_that_is_no_path_is_refused(root):
    """It would be taken for the folder of that name, `None` and the like."""
    with pytest.raises(UsageError, match="root .* must be a directory's path or an address"):
        DataRoot(root)


def test_a_stream_takes_storages(first, second):
    options = StreamOptions("train", frames=8)
    joined = ClipStream([Storage(first), Storage(second)], options, batch_size=2)
    assert [one.weight for one in joined.roots] == [1, 1]
    with pytest.raises(UsageError, match=r"'dataset' must be a prep\.storage\.Storage"):
        ClipStream("dataset", options, batch_size=2)


def test_a_root_is_noticed_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    for other in (tmp_path / "a", f"../{tmp_path.name}/a", "link"):
        with pytest.raises(UsageError, match="is named twice"):
            data_roots(["a", other])
    assert len(data_roots(["a", "b", "s3://bucket/a"])) == 3


@given(st.lists(st.lists(st.sampled_from("aAbBcC"), unique=True), min_size=1, max_size=4))
def test_class_lists_are_joined_by_name_and_by_nothing_else(lists):
    names, maps = join_class_lists(lists)
    assert len(set(names)) == len(names)
    assert set(names) == {name for one in lists for name in one}
    assert names[: len(lists[0])] == lists[0]
    for one, labels_of in zip(lists, maps, strict=True):
        assert [names[labels_of[label]] for label in range(len(one))] == one
        assert labels_of[-1] == -1


# -- training ------------------------------------------------------------------------------------


def test_labels_follow_names_and_rates_and_sizes_may_differ(first, second):
    one = loader(first, second, batch_size=11, layout="rgb", fps="7.5", frames=8)
    assert one.class_names == ["left", "up", "Left", "down"]
    assert one.num_clips == 12 + 12  # 8 frames at 7.5 fps: 15 stored ones are enough
    sizes = {tuple(size) for batch in one for size in batch.size.tolist()}
    assert sizes == {(128, 170), (170, 128), (128, 228), (96, 128)}
    own = {
        number: labels(loader(root, batch_size=1, fps="7.5", frames=8))
        for number, root in enumerate((first, second))
    }
    remapped = [{0: 0, 1: 1}, {0: 2, 1: 3, 2: 0}]
    found = labels(loader(first, second, batch_size=1, fps="7.5", frames=8))
    assert found == {
        f"{number}/{key}": remapped[number][label]
        for number, keys in own.items()
        for key, label in keys.items()
    }


def test_pixels_are_those_of_the_root_alone(first, second):
    """The start frame differs, since the key does; the pixels at a start frame must not."""
    mixed = loader(first, second, batch_size=1)
    found = {(key, start): pixels for key, _, start, pixels in sequence(mixed)}
    for number, root in enumerate((first, second)):
        alone = clip_loader(str(root), split="train", batch_size=1, layout="yuv420", seed=3)
        stream = alone.stream
        rows = {stream.index.key(int(row)): int(row) for row in stream.rows}
        for (key, start), pixels in found.items():
            part, _, own = key.partition("/")
            if int(part) == number:
                stream.placed.start_frames = lambda *_, start=start: [start]
                stream.items = lambda _, row=rows[own]: (np.array([row]), np.array([0]))
                assert [clip[3] for clip in sequence([stream[BatchAddress(0, 0, 0)]])] == [pixels]


def test_turns_are_those_of_the_page_about_order(first, second):
    """docs/order.md over the files, beside what a loader gives: names, views and start frames."""
    clips, roots = ([], []), []
    for number, (root, weight) in enumerate(((first, Fraction(3, 2)), (second, Fraction(7, 10)))):
        split = json.loads((root / "manifest.json").read_text())["splits"]["train"]
        for row in parquet.read_table(root / "index" / "train.parquet").to_pylist():
            offsets = page.frame_offsets(8, 6, Fraction(row["fps_num"], row["fps_den"]))
            if starts := page.num_starts(row["num_frames"], offsets):
                clips[number].append((f"{number}/{row['key']}", starts))
        roots.append((split["fingerprint"], len(clips[number]), weight))
    turns, wanted = list(page.training_epoch(roots, -5, 6, views=2, block=4)), []
    for step, micro in product(range(len(turns) // 12), range(2)):
        for position in page.positions(len(turns), 2, 3, 2, step, micro, rank=1):
            root, clip, view = turns[position]
            name, starts = clips[root][clip]
            wanted.append((name, view, page.training_start(starts, -5, 6, name, view)))
    one = loader((first, 1.5), (second, 0.7), seed=-5, frames=8, fps=6, clips_per_video=2,
                 shuffle_block=4, batch_size=3, world_size=2, rank=1, accumulate=2)  # fmt: skip
    one.set_epoch(6)
    assert [turn[:3] for turn in sequence(one)] == wanted


def test_equal_keys_are_different_clips(first, second):
    """left/0 and left/6 stand in both roots: both are drawn, with start frames of their own."""
    starts: dict[str, set[int]] = {}
    one = loader(first, second, batch_size=1)
    for epoch in range(6):
        one.set_epoch(epoch)
        for key, _, start, _ in sequence(one):
            starts.setdefault(key, set()).add((epoch, start))
    shared = {key[2:] for key in starts if key[0] == "0"} & {
        key[2:] for key in starts if key[0] == "1"
    }
    assert len(shared) == 2
    for key in shared:
        assert starts[f"0/{key}"] != starts[f"1/{key}"]


def test_weights_are_exact_in_what_the_loader_yields(first, second):
    one = loader((first, "2.5"), (second, 0.5), batch_size=1, clips_per_video=2)
    # 11 clips: 22 draws and 6 of 5.5; 12 clips: 6 draws; two views of each
    assert one.steps_per_epoch == 2 * (28 + 6)
    chosen = []
    for epoch in range(3):
        one.set_epoch(epoch)
        found = sequence(one)
        views = Counter(key for key, *_ in found)
        assert sorted(count for key, count in views.items() if key[0] == "0") == [4] * 5 + [6] * 6
        assert [count for key, count in views.items() if key[0] == "1"] == [2] * 6
        assert len({(key, view) for key, view, *_ in found}) == len(found)
        chosen.append(frozenset(views))
    assert len(set(chosen)) == 3


def test_repeated_draws_of_a_clip_have_other_start_frames(first):
    one = loader((first, 3), batch_size=1)
    starts: dict[str, list[int]] = {}
    for key, _, start, _ in sequence(one):
        starts.setdefault(key, []).append(start)
    assert all(len(set(found)) == 3 for found in starts.values())  # all have more than 3 starts
    assert not any("/" in key for key in starts)  # one root needs no numbers


def test_a_list_of_one_root_of_weight_1_is_that_root(first):
    alone = clip_loader(str(first), split="train", batch_size=4, seed=3, layout="yuv420")
    listed = loader((first, 1))
    assert sequence(alone) == sequence(listed)
    assert alone.state_dict() == listed.state_dict()


def test_a_state_from_before_there_were_several_roots_continues(first):
    one = loader(first)
    state = {k: v for k, v in one.state_dict().items() if k not in ("roots", "weights")}
    one.load_state_dict(json.dumps({**state, "step": 1}))
    assert len(one) == one.steps_per_epoch - 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_cut_on_other_ranks_equals_the_whole(first, second, workers):
    roots = ((first, "1.5"), (second, "0.75"))
    steps = loader(*roots, batch_size=6).steps_per_epoch  # 16.5 -> 17 and 9 draws: 4 steps of 6
    assert steps == 4

    def run(ranks, start, state=None):
        parts, states = [], []
        for rank in range(ranks):
            one = loader(
                *roots, batch_size=6 // ranks, rank=rank, world_size=ranks, num_workers=workers
            )
            one.set_epoch(1)
            if state is not None:
                one.load_state_dict(state)
            batches = []
            for batch in one:
                batches.append(sequence([batch]))
                states.append(one.state_dict())
            assert len(batches) == steps - start
            parts.append(batches)
        merged = [clip for step in zip(*parts, strict=True) for part in step for clip in part]
        return merged, states

    whole, states = run(2, 0)
    assert len(json.dumps(states[0])) < 1024
    for cut in (1, 2, 3) if not workers else (2,):
        for ranks in (6, 3, 1) if not workers else (3,):
            assert run(ranks, cut, states[cut - 1])[0] == whole[cut * 6 :]


def test_other_roots_weights_and_orders_are_refused_by_name(first, second):
    state = loader(first, (second, 2)).state_dict()
    for roots, field in (
        ((first, second), "weights was 1,2 and is 1,1"),
        ((first, (second, "2.5")), "weights was 1,2 and is 1,5/2"),
        (((second, 2), first), "roots was"),
        (((second, 1), (first, 2)), "roots was"),
        ((first,), "roots was .* and is  now"),
    ):
        with pytest.raises(UsageError, match=f"cannot resume: {field}"):
            loader(*roots, batch_size=4).load_state_dict(state)


def test_a_state_of_many_roots_is_small(first, tmp_path):
    roots = [first]
    for number in range(15):
        shutil.copytree(first, tmp_path / str(number))
        roots.append(tmp_path / str(number))
    one = loader(*((root, f"0.{number + 50}") for number, root in enumerate(roots)))
    assert len(json.dumps(one.state_dict())) < 1024


def test_a_root_that_would_never_be_drawn_from_is_refused(first, second):
    with pytest.raises(UsageError, match="weight .0.01. of .* gives none of its 11 clips an epoch"):
        loader((first, "0.01"), second)
    with pytest.raises(UsageError, match=f"no clip of split train of {second} has 45 frames"):
        loader(first, second, frames=45)


def test_a_rate_above_what_one_root_has_names_the_root(first, second):
    with pytest.raises(UsageError, match=f"{first}: 12 of 12 clips, such as .*: fps .30. must be"):
        loader(second, first, fps=30)


def test_each_root_must_have_the_training_split(first, second):
    with pytest.raises(UsageError, match=f"{first} has no split 'val'; it has train"):
        loader(second, first, split="val")


# -- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_takes_each_clip_once_whatever_the_weights(first, second, ranks):
    found = [
        clip[:2]
        for rank in range(ranks)
        for clip in sequence(
            loader((first, 3), (second, "0.1"), mode="eval", clips_per_video=2, rank=rank,
                   world_size=ranks)
        )
    ]  # fmt: skip
    assert len(found) == len(set(found)) == 2 * (11 + 12)
    assert loader(first, second, mode="eval").unscored == [
        f"0/{key}" for key in loader(first, mode="eval").unscored
    ]


def test_ranks_that_see_another_version_of_a_root_are_refused(monkeypatch):
    told = {"shards": {"train/a.tar": 2}, "versions": {"train/a.tar": "v"}, "error": ""}
    monkeypatch.setattr(pins, "_has_peers", lambda *_: True)
    monkeypatch.setattr(pins, "_broadcast_from_first", lambda _: json.dumps(told))
    bucket = SimpleNamespace(local_root=None, root="s3://bucket/root")
    found = pins.shared_versions(bucket, {"train/a.tar": 2}, rank=1, world_size=2)
    assert found == {"train/a.tar": "v"}
    with pytest.raises(KprepError, match="not the same dataset on rank 1"):
        pins.shared_versions(bucket, {"train/a.tar": 1}, rank=1, world_size=2)
    told["error"] = error_to_text(ReplacedError("what rank 0 met"))
    with pytest.raises(ReplacedError, match="^what rank 0 met$"):
        pins.shared_versions(bucket, {"train/a.tar": 2}, rank=1, world_size=2)


def test_evaluation_leaves_out_a_root_without_the_split_but_not_its_classes(first, second):
    one = loader(first, second, split="val", mode="eval")
    assert one.class_names == ["left", "up", "Left", "down"]
    found = labels(one)
    assert len(found) == 4
    assert {key[0] for key in found} == {"1"}  # numbered as in training
    assert set(found.values()) == {0, 2, 3}
    assert [root.root for root in one.roots if root.is_left_out] == [str(first)]
    with pytest.raises(UsageError, match="has no split 'tset'"):
        loader(first, second, split="tset", mode="eval")


# -- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_local_root_and_a_bucket_are_one_stream(first, second, s3, workers, tmp_path):
    url = s3.upload(second, "roots-mixed")
    mixed = loader(
        first, (DataRoot(url, 1, s3.options)), num_workers=workers,
        cache_dir=tmp_path, cache_limit="50MB",
    )  # fmt: skip
    local = loader(first, second)
    for epoch in range(2):  # the second from the cache
        mixed.set_epoch(epoch)
        local.set_epoch(epoch)
        assert sequence(mixed) == sequence(local)
    state = local.state_dict()
    mixed.load_state_dict(state)  # a copy in another place continues


def damaged(root: Path, folder: Path, key_of: int) -> tuple[Path, str]:
    """Copy a root and flip a byte of each GOP of one clip."""
    copy = folder / "damaged"
    shutil.copytree(root, copy)
    index = clip_loader(str(root), split="train", batch_size=1).stream.index
    clip = index.clip(key_of)
    data = bytearray((copy / clip.shard).read_bytes())
    for offset in clip.gop_offsets[:-1]:
        data[clip.video_offset + int(offset) + 40] ^= 255
    (copy / clip.shard).write_bytes(data)
    return copy, clip.key


def test_a_bad_clip_is_named_with_its_root(first, second, tmp_path):
    copy, key = damaged(second, tmp_path, 3)
    with pytest.raises(
        BadClipError, match=rf"{copy}/train/train-0\d+.tar: clip 1/{key} is damaged"
    ):
        sequence(loader(first, copy))
    one = loader(first, copy, bad_clips="substitute", batch_size=1)
    found = sequence(one)
    assert len(found) == 23
    bad = one.bad_clip_summary().clips
    assert [*bad] == [f"1/{key}"]
    assert bad[f"1/{key}"].shard.startswith(f"{copy}/train/")
    scored = loader(first, copy, bad_clips="substitute", mode="eval")
    assert len(sequence(scored)) == 22
    assert f"1/{key}" in scored.unscored
    with pytest.raises(DatasetError, match="more than bad_clip_limit"):
        sequence(loader(first, copy, bad_clips="substitute", bad_clip_limit=0))


def test_one_key_that_is_bad_in_one_root_is_good_in_the_other(first, second, tmp_path):
    shared = {key for key in keys(first) if key in keys(second)}
    row = next(row for row, key in enumerate(keys(second)) if key in shared)
    copy, key = damaged(second, tmp_path, row)
    one = loader(first, copy, bad_clips="substitute", batch_size=1)
    found = {clip[0] for clip in sequence(one)}
    assert f"0/{key}" in found
    assert f"1/{key}" not in found


def keys(root: Path) -> list[str]:
    index = clip_loader(str(root), split="train", batch_size=1).stream.index
    return [index.key(row) for row in range(len(index))]


def test_a_missing_root_is_named(first, tmp_path):
    with pytest.raises(DatasetError, match="nowhere does not exist"):
        loader(first, tmp_path / "nowhere")
    assert Storage(str(first)).local_root == first
