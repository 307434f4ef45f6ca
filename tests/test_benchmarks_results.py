"""What the benchmarks share: turns, medians, tables, charts, and options that cannot work."""

import argparse
import json
import sys

import pytest
from conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
import results


def test_contenders_take_turns_and_keep_every_round():
    calls = []

    def contender(name):
        def run(number):
            calls.append((number, name))
            return {"calls": float(len(calls)), "round": float(number)}

        return run

    found = results.in_turns({name: contender(name) for name in "ab"}, 3)
    assert calls == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]
    assert found == {
        "a": {"calls": [1.0, 4.0, 5.0], "round": [0.0, 1.0, 2.0]},
        "b": {"calls": [2.0, 3.0, 6.0], "round": [0.0, 1.0, 2.0]},
    }


def test_numbers_are_medians_with_their_spread():
    assert results.text([3.0, 1.0, 1234.5], 1) == "3.0 (1.0 to 1,234.5)"
    assert results.text([2.001, 2.002, 2.0]) == "2.00"
    # round by round 2, 0.5 and 3: not the ratio of the medians, which is 2 / 2
    assert results.ratio([2.0, 1.0, 6.0], [1.0, 2.0, 2.0]) == 2.0


def test_a_table_is_markdown():
    lines = results.Table(["way", "ms"], [["ours", "1"], ["floor", ""]]).lines()
    assert lines == ["| way | ms |", "| --- | --- |", "| ours | 1 |", "| floor | |"]


def test_what_is_printed_and_measured_is_written(tmp_path, capsys):
    asked = argparse.Namespace(markdown=tmp_path / "a.md", json=tmp_path / "a.json")
    results.write(asked, ["a", "b"], {"ours": {"ms": [1.0]}})
    assert capsys.readouterr().out == asked.markdown.read_text() == "a\nb\n"
    assert json.loads(asked.json.read_text()) == {"ours": {"ms": [1.0]}}


def test_a_chart_is_a_png(tmp_path):
    with results.chart(tmp_path / "a.png", 2) as axes:
        for axis in axes:
            results.bars(axis, {"ours": [1.0, 2.0, 4.0], "floor": [1.0]}, "ms")
        assert [label.get_text() for label in axes[0].get_yticklabels()] == ["ours", "floor"]
        assert [note.get_text() for note in axes[0].texts] == ["2.00", "1.00"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json", "/none/here/a.json"], "/none/here is no directory"),
        (["--chart", "a.jpg"], "must end in .png"),
        (["--chart", "a.png"], "a chart needs matplotlib: pip install 'kprep[bench]'"),
    ],
)
def test_mistakes_are_said_before_anything_is_measured(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        results.parse(argparse.ArgumentParser())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_the_orders_table_and_chart_are_of_one_run():
    import order

    measured = json.loads((REPOSITORY / "docs/images/order.json").read_text())
    page = (REPOSITORY / "docs/performance.md").read_text()
    assert "\n".join(order.table(measured["rounds"]).lines()) in page
    assert measured["machine"] in page


def test_a_storage_is_compared_with_memory_turn_by_turn():
    import stream_alone

    found = {
        "memory": {"clips_per_second": [100.0, 50.0, 200.0], "cpu": [1.0, 2.0, 1.0]},
        "S3": {"clips_per_second": [90.0, 50.0, 160.0], "cpu": [2.0, 2.0, 4.0]},
    }
    _, second = stream_alone.results_table(found).rows
    assert second == ["S3", "90 (50 to 160)", "0.900", "2.000 (2.000 to 4.000)", "0.500"]
