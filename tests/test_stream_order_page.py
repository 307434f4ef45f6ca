"""docs/order.md is enough to compute an epoch from, and says what the loader does."""

import ast
import json
import re
import sys
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace

import numpy as np
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream_mixture import mixtures, turns_at

from stream.bad_clips import substitute
from stream.mixture import Mixture, Share
from stream.order import ORDER_VERSION, BatchPlan, Permutation, derive_keys, mix
from stream.sampling import evaluation_start, frame_offsets, num_starts, training_start

TEXT = (REPOSITORY / "docs" / "order.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)[1]


def functions_of(program: str) -> SimpleNamespace:
    names = {}
    exec(compile(program, "docs/order.md", "exec"), names)  # noqa: S102 - our own page
    return SimpleNamespace(**names)


page = functions_of(block("python"))
GOLDEN = json.loads(block("json"))


def roots_of(mixture: Mixture) -> list[tuple[str, int, Fraction]]:
    return [(share.fingerprint, share.num_clips, share.weight) for share in mixture.shares]


def golden_roots(listed: list) -> list[tuple[str, int, Fraction]]:
    """The page abbreviates a fingerprint of 64 times one letter."""
    return [(name[0] * 64, clips, Fraction(weight)) for name, clips, weight in listed]


def in_roots(mixture: Mixture, turns: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(clip counted through all roots, view) as (root, clip, view)."""
    ends = np.cumsum([share.num_clips for share in mixture.shares])
    found = []
    for clip, view in turns:
        root = int(np.searchsorted(ends, clip, side="right"))
        found.append((root, clip - int(ends[root - 1] if root else 0), view))
    return found


def test_the_program_needs_the_standard_library_alone():
    nodes = ast.walk(ast.parse(block("python")))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    nodes = ast.walk(ast.parse(block("python")))
    modules += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert modules
    assert set(modules) <= sys.stdlib_module_names
    assert TEXT.startswith(f"# Order, version {ORDER_VERSION}\n")


@settings(max_examples=50)
@given(mixtures(), st.integers(0, 2**63))
def test_every_position_of_an_epoch(mixture, epoch):
    found = list(
        page.training_epoch(
            roots_of(mixture), mixture.seed, epoch, mixture.clips_per_video, mixture.grouping,
            mixture.shuffle_block,
        )
    )  # fmt: skip
    order = mixture.order(epoch)
    assert found == in_roots(mixture, turns_at(order, np.arange(len(order))))
    for position in (0, len(order) - 1):
        drawn = substitute(mixture.fingerprint, mixture.seed, epoch, position, 2, mixture.num_draws)
        clips, _ = order.clips_of(np.array([drawn]))
        ((root, clip, _),) = in_roots(mixture, [(int(clips[0]), 0)])
        assert (root, clip) == page.substitute(
            roots_of(mixture), mixture.seed, epoch, mixture.shuffle_block, position, 2
        )


@given(st.integers(1, 2500), st.integers(), st.text(max_size=4), st.data())
def test_permutations(size, number, text, data):
    place = data.draw(st.integers(0, size - 1))
    wanted = Permutation(size, text, number)(np.array([place]))[0]
    assert page.permutation(size, text, number)(place) == wanted


@given(
    st.integers(1, 300), st.integers(), st.integers(0, 99), st.text(max_size=5),
    st.integers(0, 40), st.integers(1, 9), st.sampled_from(["even", "middle", "torchvision"]),
)  # fmt: skip
def test_start_frames(starts, seed, epoch, name, view, views, placement):
    wanted = training_start(seed, epoch, name, view, starts)
    assert page.training_start(starts, seed, epoch, name, view) == wanted
    view %= views
    wanted = evaluation_start(view, views, starts, placement)
    assert page.evaluation_start(starts, views, view, placement) == wanted


rates = st.fractions(1, 60, max_denominator=1001)


@given(st.integers(1, 40), rates, rates, st.integers(1, 200))
def test_frames(frames, one, other, num_frames):
    fps, stored = sorted((one, other))
    offsets = page.frame_offsets(frames, fps, stored)
    assert offsets == frame_offsets(frames, fps, stored).tolist()
    wanted = num_starts(np.array([num_frames]), offsets[-1] + 1)[0]
    assert page.num_starts(num_frames, offsets) == wanted
    assert page.num_starts(num_frames, offsets, "pad") == max(wanted, 1)


@given(
    st.integers(0, 200), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3),
    st.integers(0, 20), st.data(),
)  # fmt: skip
def test_dealing(num_positions, world_size, batch_size, accumulate, step, data):
    micro, rank = (
        data.draw(st.integers(0, accumulate - 1)),
        data.draw(st.integers(0, world_size - 1)),
    )
    plan = BatchPlan(num_positions, world_size, batch_size, accumulate, drop_last=False)
    found = page.positions(num_positions, world_size, batch_size, accumulate, step, micro, rank)
    assert list(found) == plan.positions(step, micro, rank).tolist()


def test_golden_values():
    """Of the page's program, and of ours where the tests above do not compare the two."""
    (count, *parts), keys = GOLDEN["derive_keys"]
    assert keys == page.derive_keys(count, *parts) == derive_keys(count, *parts).tolist()
    value, mixed = GOLDEN["mix"]
    assert mixed == page.mix(value) == int(mix(np.array([value], dtype=np.uint64))[0])
    for (size, *parts), first in GOLDEN["permutation"]:
        assert first == [page.permutation(size, *parts)(place) for place in range(len(first))]
        assert first == Permutation(size, *parts)(np.arange(len(first))).tolist()
    for values in GOLDEN["training_epoch"]:
        roots, first = golden_roots(values.pop("roots")), values.pop("first")
        found = islice(page.training_epoch(roots, **values), len(first))
        assert first == [list(turn) for turn in found]
        mixture = Mixture(
            tuple(Share(*root) for root in roots),
            values["seed"], values.get("views", 1), values.get("grouping", "spread"), values.get("block", 1),
        )  # fmt: skip
        turns = turns_at(mixture.order(values["epoch"]), np.arange(len(first)))
        assert first == [list(turn) for turn in in_roots(mixture, turns)]
    (listed, *rest), found = GOLDEN["substitute"]
    assert tuple(found) == page.substitute(golden_roots(listed), *rest)
    for *given_values, start in GOLDEN["training_start"]:
        assert start == page.training_start(*given_values)
    for *given_values, start in GOLDEN["evaluation_start"]:
        assert start == page.evaluation_start(*given_values)
    (frames, fps, stored), offsets = GOLDEN["frame_offsets"]
    assert offsets == page.frame_offsets(frames, Fraction(fps), Fraction(stored))
