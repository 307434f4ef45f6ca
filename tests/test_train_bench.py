"""`kprep bench train`: three contenders on the same clips, and mistakes in one sentence."""

import gc
import json
import weakref

import pytest
from conftest import run_kprep

from stream.bench_measure import Spread
from train import bench as train_bench
from train.bench import TrainBench, bench_train, table
from train.recipe import load_recipe


@pytest.mark.slow
def test_network_loader_and_both_are_measured(motion_dataset):
    done = run_kprep(
        "bench", "train", motion_dataset, "--recipe", "tiny", "--device", "cpu",
        "--set", "data.accumulate=2", "--set", "data.batch_size=4", "--steps", 3, "--rounds", 2, "--json",
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["model"] == "tiny"
    assert found["device"] == "cpu"
    assert found["mfu"] is None  # of a CPU nobody knows the peak
    assert found["gflops"] > 0
    assert 0 <= found["wait"]["low"] <= found["wait"]["high"] < 1
    assert min(found[way]["low"] for way in ("network", "loader", "training")) > 0
    # both together are never faster than the loader alone by more than a round's noise
    assert found["training"]["low"] < 2 * found["loader"]["high"]


@pytest.mark.slow
def test_it_goes_on_into_the_next_epoch(motion_dataset):
    """160 videos of 2 clips and a batch of 32 make 10 steps an epoch; 4 kept and 2 x 4 go beyond it."""
    done = run_kprep(
        "bench", "train", motion_dataset, "--recipe", "tiny", "--device", "cpu",
        "--set", "data.batch_size=32", "--steps", 4, "--rounds", 1,
    )  # fmt: skip
    assert "training reaches" in done.stdout
    assert "waits for data" in done.stdout


def test_nothing_keeps_its_loader(motion_dataset, monkeypatch):
    """In a cycle of references torch's workers are not told to end: 5 seconds for each of them."""
    make, made = train_bench.training_loader, []

    def noted(*arguments):
        loader = make(*arguments)
        made.append(weakref.ref(loader))
        return loader

    monkeypatch.setattr(train_bench, "training_loader", noted)
    recipe = load_recipe("tiny", ["data.workers=0", "data.batch_size=4"])
    gc.disable()
    try:
        bench_train(recipe, str(motion_dataset), split="train", steps=1, rounds=1, device="cpu")
        assert [loader() for loader in made] == [None]
    finally:
        gc.enable()


def test_kernels_that_are_missing_are_said():
    one = Spread.of([1.0])
    for slower in (
        None,
        "batch normalisation by PyTorch's kernels, which take longer: no compiler",
    ):
        bench = TrainBench("NVIDIA H200", one, one, one, one, one, 0.0, None, slower)
        assert [line for line in table(bench) if "longer" in line] == ([slower] if slower else [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "tony"), "recipe 'tony' does not exist"),
        (("--recipe", "tiny", "--set", "data.batch=3"), "'batch'"),
        (("--recipe", "tiny", "--split", "test"), "no split 'test'"),
    ],
)
def test_mistakes_are_one_sentence(motion_dataset, arguments, words):
    done = run_kprep("bench", "train", motion_dataset, *arguments, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
