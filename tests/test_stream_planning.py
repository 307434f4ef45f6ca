"""`kprep plan`: its numbers against the real loader, its arithmetic against brute force."""

import itertools
import json
import math
import shutil
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from stream_datasets import make_dataset, without_gop_index

from prep.errors import UsageError
from prep.storage import Storage
from stream import clip_loader
from stream.cache import ADMITTED_SHARE
from stream.index import ClipIndex
from stream.order import EpochOrder
from stream.plan_cache import plan_cache
from stream.plan_command import plan_command, size_text
from stream.plan_splits import StoredSplit, SyntheticSplit
from stream.planning import PlanOptions, make_plan
from stream.shuffle_quality import measure


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("plan"))


def small(**more) -> PlanOptions:
    given = {"nodes": 1, "gpus": 2, "workers": 2, "batch": 3, "epochs": 2, "clips_per_second": 10.0}
    return PlanOptions(**{**given, **more})


def read_by_the_loader(root, monkeypatch, options: PlanOptions) -> tuple[int, int, int]:
    """Iterate over all ranks' epoch; return clips, bytes and requests to shards."""
    seen = []
    real = Storage.read_range

    def counted(self, path, start, end, **more):
        seen.append(end - start)
        return real(self, path, start, end, **more)

    monkeypatch.setattr(Storage, "read_range", counted)
    clips = 0
    for rank in range(options.world_size):
        loader = clip_loader(
            str(root), split="train", batch_size=options.batch, frames=options.frames,
            fps=options.fps, clips_per_video=options.clips_per_video, seed=options.seed, rank=rank,
            world_size=options.world_size, accumulate=options.accumulate, layout="yuv420",
            grouping=options.grouping, shuffle_block=options.shuffle_block,
        )  # fmt: skip
        clips += sum(len(batch) for batch in loader)
    monkeypatch.undo()
    return clips, sum(seen), len(seen)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"clips_per_video": 3, "accumulate": 2},
        {"clips_per_video": 4, "grouping": "together", "frames": 8, "seed": 5},
        {"shuffle_block": 6, "fps": Fraction("7.5"), "frames": 8},
    ],
)
def test_bytes_and_requests_are_those_of_the_real_loader(root, monkeypatch, more):
    options = small(**more)
    plan = make_plan(StoredSplit(Storage(str(root)), "train"), options)
    clips, size, requests = read_by_the_loader(root, monkeypatch, options)
    assert plan.sample.whole_epoch
    assert (plan.sample.clips, plan.sample.bytes, plan.sample.requests) == (clips, size, requests)
    assert clips == plan.steps_per_epoch * plan.global_batch
    assert plan.reads.bytes_per_epoch == pytest.approx(size)
    assert plan.reads.requests_run == pytest.approx(requests * options.epochs)
    assert plan.reads.bytes_per_second == pytest.approx(size / clips * 10)


def test_a_split_without_gop_index_is_read_whole(root, monkeypatch, tmp_path):
    import shutil

    copy = shutil.copytree(root, tmp_path / "root")
    without_gop_index(copy)
    plan = make_plan(StoredSplit(Storage(str(copy)), "train"), small(clips_per_video=1))
    clips, size, requests = read_by_the_loader(copy, monkeypatch, small(clips_per_video=1))
    assert (plan.sample.bytes, plan.sample.requests) == (size, requests)
    assert plan.reads.clip_share == 1


def test_steps_and_what_is_left_out(root):
    plan = make_plan(StoredSplit(Storage(str(root)), "train"), small(clips_per_video=5))
    # 24 clips of which one has 15 frames: 23 x 5 = 115 positions, 19 steps of 2 x 3, 1 left
    assert (plan.clips, plan.clips_too_short, plan.global_batch) == (23, 1, 6)
    assert (plan.steps_per_epoch, plan.steps_run, plan.left_out_per_epoch) == (19, 38, 1)
    assert plan.epoch_seconds == 19 * 6 / 10
    assert any("1 of 24 clips are too short" in text for text in plan.warnings)
    index = make_index_sizes(root)
    sizes = [size for frames, size in index if frames >= 16]
    assert plan.cache.split_bytes == sum(sizes)
    assert plan.cache.needed_limit_bytes >= sum(-(-size // 4096) * 4096 for size in sizes)


def test_a_split_can_have_as_many_rates_as_clips(root, monkeypatch):
    rates = {Fraction(rate): np.zeros(0, dtype=np.int64) for rate in range(1, 40_000)}
    rates[Fraction(40_000)] = np.arange(24)
    monkeypatch.setattr(ClipIndex, "rates", lambda _: rates)
    assert StoredSplit(Storage(str(root)), "train")._rate_of.tolist() == [39_999] * 24


def make_index_sizes(root) -> list[tuple[int, int]]:
    """Frames and bytes of every clip, straight from the Parquet file."""
    import pyarrow.parquet as pq

    table = pq.read_table(Path(root) / "index/train.parquet")
    return list(zip(table["num_frames"].to_pylist(), table["video_bytes"].to_pylist(), strict=True))


def test_what_cannot_work_is_said_and_not_raised(root):
    split = StoredSplit(Storage(str(root)), "train")
    fast = make_plan(split, small(fps=Fraction(30)))
    assert len(fast.problems) == 1
    assert "24 of 24 clips: fps (30)" in fast.problems[0]
    long = make_plan(split, small(frames=500))
    assert "none of the 24 clips has 500 frames" in long.problems[0]
    large = make_plan(split, small(batch=100))
    assert "115 clips an epoch cannot fill a batch of 200" in large.problems[0]
    assert large.reads is large.memory is large.cache is large.shuffle_step is None


def test_memory_follows_its_formula(root):
    options = small(workers=3, prefetch_batches=2, layout="rgb")
    plan = make_plan(StoredSplit(Storage(str(root)), "train"), options)
    # the largest of the three sizes: 192x108 becomes 228x128 (even, short side 128); RGB: 3 bytes
    assert plan.memory.batch_bytes == 3 * 16 * 228 * 128 * 3
    assert plan.memory.batches == 3 * (2 + 1) + 2
    assert plan.memory.node_bytes == 2 * plan.memory.rank_bytes + plan.memory.index_bytes


@pytest.mark.parametrize(("nodes", "views", "grouping"), [(1, 2, "spread"), (3, 2, "spread"), (3, 2, "together")])  # fmt: skip
def test_cache_expectations_equal_an_enumeration_of_all_ways(nodes, views, grouping):
    """Every way in which the draws of one clip can fall on nodes, over two epochs."""
    draws = views if grouping == "spread" else 1
    first = fetched = ways = 0
    for fall in itertools.product(range(nodes), repeat=2 * draws):
        ways += 1
        first += len(set(fall[:draws])) / nodes
        fetched += len(set(fall))
    plan = plan_cache(
        clips=10, split_bytes=1000, disk_bytes=1200, views=views, grouping=grouping, nodes=nodes, epochs=2,
        limit_bytes=None, requests_per_view=1.0, bytes_per_view=20.0,
    )  # fmt: skip
    assert plan.second_epoch[-1].nodes == nodes
    assert plan.second_epoch[-1].held_share == pytest.approx(first / ways)
    assert plan.requests_run == pytest.approx(10 * fetched / ways)
    assert plan.bytes_run == pytest.approx(1000 * fetched / ways)


def test_a_cache_of_half_the_split_reads_the_other_half_in_parts():
    plan = plan_cache(
        clips=10, split_bytes=1000, disk_bytes=1200, views=2, grouping="spread", nodes=1, epochs=3,
        limit_bytes=math.ceil(600 / ADMITTED_SHARE), requests_per_view=1.5, bytes_per_view=20.0,
    )  # fmt: skip
    assert plan.kept_share == pytest.approx(0.5, rel=0.01)
    assert plan.requests_run == pytest.approx(5 + 5 * 2 * 3 * 1.5, rel=0.01)
    assert plan.bytes_run == pytest.approx(500 + 5 * 2 * 3 * 20, rel=0.01)


def test_shuffle_quality_of_known_batches():
    rows = np.array([[0, 1, 2, 9], [4, 6, 8, 10]])
    labels = np.array([[0, 0, 0, 1], [0, 1, 2, 3]])
    quality = measure(rows, labels, clips=12, views=1, same_class_share=0.25)
    # 3 equal pairs of 12, against a quarter of 12; of 8 clips, 0 and 1 stand beside their next
    assert quality.class_repeats == pytest.approx(3 / (12 * 0.25))
    assert quality.company == 2 / 8
    # 11 of 12 clips have a next one, which is among the batch's other 3 of 11
    assert quality.company_ideal == pytest.approx(11 / 12 * 3 / 11)
    assert measure(rows, labels - 1, clips=12, views=1, same_class_share=0.25).class_repeats is None


@pytest.mark.parametrize("views", [1, 3])
def test_perfect_shuffling_is_what_block_one_comes_near_to(views):
    options = PlanOptions(gpus=4, batch=32, clips_per_video=views)
    plan = make_plan(SyntheticSplit(20_000, sorted_by_class=True), options)
    assert plan.shuffle_step.class_repeats == pytest.approx(1, abs=0.05)
    assert plan.shuffle_step.company == pytest.approx(plan.shuffle_step.company_ideal, rel=0.2)


def test_blocks_cost_mixing():
    sorted_split = SyntheticSplit(20_000, sorted_by_class=True)
    plans = [make_plan(sorted_split, PlanOptions(batch=32, gpus=4, clips_per_video=1, shuffle_block=block)) for block in (1, 8, 64)]  # fmt: skip
    repeats = [plan.shuffle_step.class_repeats for plan in plans]
    company = [plan.shuffle_step.company for plan in plans]
    assert repeats[0] < 2 < repeats[1] < repeats[2]
    assert company[0] < 0.1
    assert 0.8 < company[1] < company[2]
    assert any("shuffle_block (64)" in text for text in plans[2].warnings)


def test_a_plan_of_ten_million_clips_stays_small():
    make_plan(SyntheticSplit(1000), PlanOptions(gpus=1))  # imports and caches
    tracemalloc.start()
    plan = make_plan(SyntheticSplit(10_000_000), PlanOptions(nodes=128, gpus=8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.global_batch == 1024 * 24
    assert plan.steps_per_epoch == 50_000_000 // plan.global_batch
    assert not plan.sample.whole_epoch
    assert peak < 50_000_000


def test_the_sample_is_part_of_the_real_order():
    """The first sampled batch is the order's first, with the same jitter."""
    split = SyntheticSplit(5000)
    order = EpochOrder(split.fingerprint, 5000, seed=0, epoch=0, clips_per_video=5)
    plan = make_plan(split, PlanOptions(gpus=1, batch=4000))
    clips, _ = order(np.arange(4000))
    whole = sum(split.clip(int(clip)).video_bytes for clip in clips)
    assert plan.sample.batches == 1
    assert plan.sample.clip_bytes == whole


KEYS = {
    "root", "split", "planning_seconds", "clips", "clips_too_short", "global_batch",
    "steps_per_epoch", "steps_run", "left_out_per_epoch", "epoch_seconds", "run_seconds", "sample",
    "reads", "cache", "memory", "shuffle_step", "shuffle_rank", "problems", "warnings",
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(plan_command, [str(argument) for argument in arguments])


def test_json_has_stable_keys(root):
    done = run(root, "--gpus", 2, "--batch", 3, "--cache-limit", "1MB", "--json")
    found = json.loads(done.output)
    assert set(found) == KEYS
    assert found["cache"]["limit_bytes"] == 1_000_000
    assert set(found["reads"]) >= {"bytes_per_clip", "requests_per_clip", "clip_share", "cost_run",
                                   "bytes_per_second_node", "requests_per_epoch"}  # fmt: skip


def test_text_says_the_main_things(root):
    text = run(root, "--gpus", 2, "--batch", 3).output
    for word in ("steps", "an epoch", "requests", "cache", "memory", "shuffling", "planned in"):
        assert word in text
    assert "100,000 clips" in run("--synthetic", 100_000).output


def test_a_batch_of_one_clip_repeats_no_class(root):
    words = " ".join(run(root, "--gpus", 1, "--workers", 1, "--batch", 1).output.split())
    assert "a step of 1: one clip repeats no class; " in words
    assert "no labels" not in words


def test_a_terminal_of_80_columns_shows_lines_as_they_are(root):
    large = ["--synthetic", 10**7, "--nodes", 128, "--gpus", 1, "--cache-limit", "100GB"]
    for arguments in ([root, "--gpus", 1, "--batch", 3], [*large, "--clips-per-second", 60_000]):
        assert max(map(len, run(*arguments).output.splitlines())) <= 80
    lines = run(*large, "--clips-per-second", 60_000, "--price-per-gb", 0.5).output.splitlines()
    words = " ".join(" ".join(lines).split())
    steps = 5 * 10**7 // (128 * 24)
    seconds = steps * 128 * 24 / 60_000
    assert f"steps {steps:,} an epoch and rank, {steps * 45:,} in all" in words
    times = f"{seconds / 60:.1f} minutes an epoch, {seconds * 45 / 3600:.1f} hours in all"
    assert f"time {times} at 60,000 clips/s" in words
    assert "the prices: 0.0004 for 1,000 requests, 0.5 for a GB" in words
    assert "requests a second are above the 5,500 that S3" in words


def test_a_root_whose_name_a_terminal_obeys_is_shown_as_text(root, tmp_path):
    odd = shutil.copytree(root, tmp_path / "a\x1b[2Jb")
    output = run(odd, "--gpus", 1, "--batch", 3).output
    assert "a [2Jb" in output
    assert "\x1b" not in output


def test_one_of_a_thing_is_not_several(root):
    words = " ".join(run(root, "--gpus", 1, "--batch", 3).output.split())
    assert "3 clips each on 1 rank;" in words
    assert "100% on 1 node" in words


def test_a_run_that_cannot_work_exits_with_1(root):
    done = run(root, "--fps", 30)
    assert done.exit_code == 1
    assert "cannot work: 24 of 24 clips" in done.output


def test_a_higher_rate_is_proposed_where_there_is_one(root):
    for fps, way in ((15, ""), (5, " or a higher fps")):
        done = run(root, "--frames", 400, "--fps", fps, "--json")
        problem = f"none of the 24 clips has 400 frames at {fps} fps; ask for fewer frames{way}"
        assert json.loads(done.output)["problems"] == [problem]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either ROOT or --synthetic"),
        (["--synthetic", 10, "--batch", 0], "batch (0)"),
        (["--synthetic", 10, "--clips-per-second", 0], "clips_per_second"),
        (["--synthetic", 10, "--cache-limit", "many"], "cache_limit"),
        (["--synthetic", 10, "--cache-limit", "0"], "cache_limit_bytes (0)"),
        (["--synthetic", 10, "--fps", "x"], "fps"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words):
    error = run(*arguments).exception
    assert isinstance(error, UsageError)
    assert words in str(error)
    assert "\n" not in str(error)


def test_no_made_up_clips_are_refused():
    done = run("--synthetic", 0)
    assert done.exit_code == 2
    assert "Invalid value for '--synthetic'" in done.output


def test_an_unknown_split_is_named(root):
    error = run(root, "--split", "test").exception
    assert isinstance(error, UsageError)
    assert "it has train" in str(error)


def test_sizes_are_readable():
    assert [size_text(count) for count in (12, 3400, 5.6e9, 7e15)] == ["12 bytes", "3.4 kB", "5.6 GB", "7.0 PB"]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [
    ({"clips_per_second": math.nan}, "clips_per_second"),
    ({"clips_per_second": math.inf}, "clips_per_second"),
    ({"price_per_gb": math.nan}, "price_per_gb"),
    ({"price_per_1000_requests": math.inf}, "price_per_1000_requests"),
    ({"frames": 10**9}, "frames"),
    ({"epochs": 10**400}, "epochs"),
    ({"cache_limit_bytes": 10**30}, "cache_limit_bytes"),
    ({"nodes": 10**6, "batch": 10**6}, "nodes x gpus x batch x accumulate"),
])  # fmt: skip
def test_numbers_that_no_run_has_are_refused(change, words):
    with pytest.raises(UsageError, match=rf"{words} \(.*\) must be"):
        PlanOptions(**change)


def test_an_epoch_beyond_exact_arithmetic_is_refused():
    with pytest.raises(UsageError, match="clips x views an epoch must be at most"):
        make_plan(SyntheticSplit(10**12), PlanOptions(clips_per_video=2))
    plan = make_plan(SyntheticSplit(5 * 10**11), PlanOptions(clips_per_video=2))
    assert plan.steps_per_epoch == 10**12 // 24


def test_views_without_end_are_refused(root):
    with pytest.raises(UsageError, match="clips x views an epoch must be at most"):
        clip_loader(root, split="train", batch_size=2, clips_per_video=10**12)
    with pytest.raises(UsageError, match="fps"):
        clip_loader(root, split="train", batch_size=2, fps="1e400")
