"""The page of an evaluation in a real browser: it draws, answers the mouse, and runs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from browser import browser_for_tests, chromium
from test_train_evaluation import _count
from test_train_evaluation_files import METRICS, NAMES, _evaluation

from train.report_page import report_page

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from browser import Page

pytestmark = pytest.mark.slow
# The middle of a cell of the matrix, by line and column, as a position in the window
CELL = (
    "(() => { const b = canvas.getBoundingClientRect();"
    " return [b.x + margin + (%d + 0.5) * cell, b.y + margin + (%d + 0.5) * cell]; })()"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium(browser_for_tests()) as page:
        page.window(1280, 900)
        yield page


def _open(browser: Page, folder: Path, text: str) -> None:
    browser.requests.clear()
    browser.messages.clear()
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    browser.open(path.as_uri())
    assert browser.messages == []
    assert browser.requests == [path.as_uri()]


def _point_at(browser: Page, row: int, column: int) -> str:
    browser.place_of("#matrix")
    x, y = browser.run(CELL % (column, row))
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    return browser.run("document.getElementById('cell').textContent")


def _texts(browser: Page, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll('{selector}')].map(e => e.textContent)")


def test_names_are_shown_as_text_and_the_matrix_answers(browser: Page, tmp_path: Path) -> None:
    accuracy, videos = _evaluation()
    _open(browser, tmp_path, report_page("run", accuracy, videos, NAMES, METRICS))
    assert _texts(browser, "#classes td:nth-child(2)") == NAMES
    assert _texts(browser, "#tiles b")[0] == "40.00 %"  # two of the five with a label
    assert "by hand" in _texts(browser, "#protocol")
    assert _texts(browser, "#unscored div") == ["<b>short"]
    assert _texts(browser, "#worst tbody tr:first-child td") == [
        "run",
        NAMES[1],
        "2",
        "3",
        "66.7 %",
    ]
    assert browser.run("document.scripts.length") == 2
    said = _point_at(browser, 0, 1)
    assert said == f"run (3 videos, 33.3 % right) → {NAMES[1]}: 2 videos, 66.7 %"
    browser.run("document.getElementById('find').value = 'QUOTED'; drawClasses()")
    assert _texts(browser, "#classes td:nth-child(2)") == [NAMES[2]]
    assert browser.messages == []


def test_400_classes_can_be_found_ordered_and_zoomed_into(browser: Page, tmp_path: Path) -> None:
    """Class n is always taken for class 399 - n, but for the last, which is recognised."""
    rows = []
    for label in range(400):
        scores = torch.full((400,), 0.1)
        scores[399 - label if label < 399 else 399] = 1.0
        rows += [(f"v{label}-{n}", 0, label, scores.tolist()) for n in range(2)]
    accuracy, videos = _count(rows)
    names = [f"class {n}" for n in range(400)]
    _open(browser, tmp_path, report_page("run", accuracy, videos, names, METRICS))
    assert browser.run("canvas.clientWidth") == 800  # two pixels a class, whole
    assert (
        _point_at(browser, 3, 396)
        == "class 3 (2 videos, 0.0 % right) → class 396: 2 videos, 100.0 %"
    )
    browser.run(
        "document.getElementById('order').value = 'best'; document.getElementById('order').onchange()"
    )
    assert browser.run("order[0]") == 399
    browser.run(
        "document.getElementById('order').value = 'near'; document.getElementById('order').onchange()"
    )
    places = browser.run("names.map((_, label) => order.indexOf(label))")
    assert sorted(places) == list(range(400))
    assert all(abs(places[n] - places[399 - n]) == 1 for n in range(1, 399))
    browser.run("zoom.value = 20; zoom.oninput()")
    assert browser.run("margin > 0 && canvas.clientWidth === Math.round(margin + 400 * 20)")
    browser.click("#worst tbody tr:first-child")
    assert browser.run("!document.getElementById('class').hidden")
    assert browser.messages == []
