"""Several roots in one epoch as pure arithmetic: exact counts, exact partition, exact continuation."""

import tracemalloc
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.mixture import Mixture, Share
from stream.order import ORDER_VERSION, BatchPlan, EpochOrder

weights = st.one_of(
    st.fractions(Fraction(1, 20), 4, max_denominator=20),
    st.integers(1, 3).map(Fraction),
    st.sampled_from(["0.1", "0.25", "1.5", "2.333"]).map(Fraction),
)
shares = st.lists(st.tuples(st.integers(1, 60), weights), min_size=1, max_size=4)


@st.composite
def mixtures(draw):
    roots = draw(shares)
    mixture = Mixture(
        tuple(Share(f"{number:064x}", *root) for number, root in enumerate(roots)),
        seed=draw(st.integers(0, 3)),
        clips_per_video=draw(st.integers(1, 3)),
        grouping=draw(st.sampled_from(["spread", "together"])),
        shuffle_block=draw(st.sampled_from([1, 1, 4, 50])),
    )
    return mixture if mixture.num_draws else mixture_of((7, "1.5"), (3, "1"))


def mixture_of(*roots, **more):
    return Mixture(
        tuple(
            Share(f"{number:064x}", count, Fraction(weight))
            for number, (count, weight) in enumerate(roots)
        ),
        **more,
    )


def turns_at(order, positions):
    clips, views = order(positions)
    return list(zip(clips.tolist(), views.tolist(), strict=True))


def whole(mixture, epoch):
    return turns_at(mixture.order(epoch), np.arange(mixture.num_positions))


@given(
    st.integers(1, 3000),
    st.integers(0, 4),
    st.integers(1, 4),
    st.sampled_from(["spread", "together"]),
    st.integers(1, 30),
)
@settings(max_examples=40)
def test_one_root_of_weight_1_has_the_order_that_it_always_had(
    count, epoch, views, grouping, block
):
    mixture = Mixture((Share("f" * 64, count),), 5, views, grouping, block)
    plain = EpochOrder("f" * 64, count, 5, epoch, views, grouping, block)
    assert (mixture.num_positions, mixture.fingerprint) == (len(plain), "f" * 64)
    positions = np.arange(len(plain))
    for mine, theirs in zip(mixture.order(epoch)(positions), plain(positions), strict=True):
        assert np.array_equal(mine, theirs)


@given(mixtures(), st.integers(0, 3))
@settings(max_examples=100)
def test_each_clip_has_its_draws_and_the_fraction_has_one_more(mixture, epoch):
    """Every view of every draw once: floor(w) draws of each clip, and a distinct rest of a fixed size."""
    turns, views = Counter(whole(mixture, epoch)), mixture.clips_per_video
    assert set(turns.values()) == {1}
    seen, first = defaultdict(list), 0
    for clip, view in turns:
        seen[clip].append(view)
    for share in mixture.shares:
        clips = range(first, first + share.num_clips)
        for clip in clips:  # whole draws, views counted through
            assert sorted(seen[clip]) == list(range(len(seen[clip]) // views * views))
        floor = share.weight.numerator // share.weight.denominator
        more = Counter(len(seen[clip]) // views - floor for clip in clips)
        assert set(more) <= {0, 1}
        exact = (share.weight - floor) * share.num_clips
        assert abs(more[1] - exact) <= Fraction(1, 2)
        first += share.num_clips


@given(mixtures(), st.integers(0, 5), st.data())
@settings(max_examples=40)
def test_any_position_by_itself_is_what_the_whole_has_there(mixture, epoch, data):
    everything = whole(mixture, epoch)
    place = data.draw(st.integers(0, len(everything) - 1))
    clip, view = mixture.order(epoch)(np.array([place]))
    assert (int(clip[0]), int(view[0])) == everything[place]


def test_a_half_counts_up_and_epochs_are_equally_long():
    lengths = {
        weight: mixture_of((5, weight)).num_draws for weight in ("0.1", "0.3", "0.29", "2.5")
    }
    assert lengths == {"0.1": 1, "0.3": 2, "0.29": 1, "2.5": 13}  # 0.5, 1.5, 1.45 and 12.5 draws


def test_golden_draws_of_a_weighted_mixture_of_order_version_1():
    """These numbers never change while ORDER_VERSION is 1: resumed runs depend on them."""
    assert ORDER_VERSION == 1
    mixture = Mixture((Share("a" * 64, 7, Fraction(3, 2)), Share("b" * 64, 5)), seed=2)
    clips, _ = mixture.order(1)(np.arange(mixture.num_positions))
    assert clips.tolist() == [11, 5, 4, 2, 10, 7, 5, 9, 6, 1, 3, 3, 1, 2, 8, 0]


def test_the_fraction_is_another_one_each_epoch_and_each_seed():
    chosen = [
        frozenset(clip for clip, _ in whole(mixture_of((400, "0.25"), seed=seed), epoch))
        for seed in (0, 1)
        for epoch in range(8)
    ]
    assert {len(clips) for clips in chosen} == {100}
    assert len(set(chosen)) == 16
    met = Counter(clip for clips in chosen for clip in clips)
    # 16 choices at odds of 1/4: a clip is in none of them at odds of 0.75^16, about 4 of the 400
    assert 380 <= len(met) <= 400
    overlap = np.mean([len(a & b) for a in chosen for b in chosen if a is not b])
    assert 20 < overlap < 30  # 25 by chance


def test_a_shuffle_block_chooses_runs_of_neighbours():
    clips, _ = mixture_of((1000, "0.3"), shuffle_block=50).order(1)(np.arange(300))
    assert (np.diff(np.sort(clips)) == 1).mean() > 0.95


def test_equal_roots_are_not_drawn_alike():
    mixture = Mixture((Share("f" * 64, 400, Fraction(1, 4)),) * 2)
    clips = np.array([clip for clip, _ in whole(mixture, 0)])
    assert set(clips[clips < 400]) != set(clips[clips >= 400] - 400)


def test_the_fingerprint_covers_roots_order_and_weights():
    first, second = Share("a" * 64, 10), Share("b" * 64, 10)
    found = {
        Mixture(roots).fingerprint
        for roots in (
            (first,),
            (second,),
            (first, second),
            (second, first),
            (first, Share("b" * 64, 10, Fraction(2))),
            (Share("a" * 64, 10, Fraction(2)),),
            (first, first),
        )
    }
    assert len(found) == 7


@given(mixtures(), st.integers(1, 7), st.integers(1, 5), st.integers(1, 2))
@settings(max_examples=40)
def test_ranks_have_equal_steps_and_no_draw_twice(mixture, ranks, batch, accumulate):
    plan = BatchPlan(mixture.num_positions, ranks, batch, accumulate)
    dealt = []
    for rank in range(ranks):
        mine = [
            plan.positions(step, micro, rank)
            for step in range(plan.num_steps)
            for micro in range(accumulate)
        ]
        assert all(len(part) == batch for part in mine)  # the same number of full batches
        dealt += turns_at(mixture.order(2), np.concatenate([np.arange(0), *mine]))
    assert len(set(dealt)) == len(dealt) == mixture.num_positions - plan.num_left_out
    assert set(dealt) <= set(whole(mixture, 2))


@given(mixtures(), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=40)
def test_eight_ranks_then_two_then_six_see_what_one_sees(mixture, first, second):
    """Cut at any two steps of a global batch of 24: 8 x 3, then 2 x 12, then 6 x 4."""
    order = mixture.order(1)
    alone = BatchPlan(mixture.num_positions, 1, 24)
    steps = alone.num_steps
    cuts = [0, *sorted((min(first, steps), min(second, steps))), steps]
    seen = []
    for (ranks, batch), begin, end in zip(((8, 3), (2, 12), (6, 4)), cuts, cuts[1:], strict=False):
        plan = BatchPlan(mixture.num_positions, ranks, batch)
        assert plan.num_steps == steps
        for step in range(begin, end):
            for rank in range(ranks):
                seen += turns_at(order, plan.positions(step, 0, rank))
    assert seen == whole(mixture, 1)[: steps * 24]


@pytest.mark.parametrize("grouping", ["spread", "together"])
def test_planning_ten_million_clips_needs_no_list(grouping):
    mixture = mixture_of(
        (6_000_000, "1.37"), (4_000_000, "0.5"), clips_per_video=5, grouping=grouping
    )
    assert mixture.num_draws == 8_220_000 + 2_000_000
    tracemalloc.start()
    clips, views = mixture.order(3)(np.arange(45_000_000, 45_001_536))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert clips.max() < 10_000_000
    assert views.max() < 10
