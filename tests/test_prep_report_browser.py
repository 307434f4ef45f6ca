"""The report page in a real browser: it renders, filters, plays, and asks nobody for anything."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import PageError, browser_for_tests, chromium
from conftest import run_kprep
from report_datasets import CLASSES, CLOSING, SCRIPT, damage

if TYPE_CHECKING:
    from browser import Page

pytestmark = pytest.mark.slow
SHOWN = "[...document.querySelectorAll('#grid .clip')]"
LABELS = f"{SHOWN}.map(b => b.querySelector('.label').textContent)"
READY = f"{SHOWN}.length > 0 && [...document.images].every(i => i.complete && i.naturalWidth)"
MOTION = "motion"


@pytest.fixture(scope="module")
def browser():
    with chromium(browser_for_tests()) as page:
        yield page


@pytest.fixture(scope="module")
def pages(odd_dataset, motion_dataset, tmp_path_factory) -> dict[str, str]:
    """Addresses of three pages: of the odd dataset, of one that is damaged, and of the demo's."""
    browser_for_tests()  # no page is made where nothing can look at it
    folder = tmp_path_factory.mktemp("pages")
    damaged = Path(shutil.copytree(odd_dataset, folder / "damaged"))
    damage(damaged, "train", 0)
    roots = {"odd": odd_dataset, "damaged": damaged, MOTION: motion_dataset}
    for name, root in roots.items():
        run_kprep("report", root, folder / f"{name}.html")
    return {name: (folder / f"{name}.html").as_uri() for name in roots}


@pytest.fixture
def page(browser: Page, pages):
    """The browser with nothing noted yet; at the end it must have met no error and no request."""
    browser.window(1280, 900)
    browser.requests.clear()
    browser.messages.clear()
    yield browser
    assert browser.messages == []
    strange = [url for url in browser.requests if url.split(",")[0].split(";")[0] not in ("data:image/webp", "data:") and url not in pages.values()]  # fmt: skip
    assert strange == []


def choose(page: Page, control: str, value: str) -> None:
    """Do what a person's choice in a list does."""
    page.run(f"(() => {{ const e = document.getElementById('{control}'); e.value = {json.dumps(value)};"
             "e.dispatchEvent(new Event('input', {bubbles: true})); })()")  # fmt: skip


def write(page: Page, text: str) -> None:
    page.click("#text")
    for letter in text:
        page.press(letter)


def test_the_page_renders_its_clips_and_numbers(page, pages):
    page.open(pages["odd"])
    page.wait_for(READY)
    assert page.run("document.title") == "odd: kprep report"
    assert page.run(f"{SHOWN}.length") == 13
    assert sorted(set(page.run(LABELS))) == sorted(CLASSES[:3])
    assert page.run("document.querySelectorAll('svg.plot').length") == 2
    assert page.run("getComputedStyle(document.querySelector('.tiles')).display") == "grid"
    assert page.run("document.getElementById('counted').textContent") == "13 sampled clips"
    bars = page.run("document.querySelector('#classes svg.bar rect').getBoundingClientRect().width")
    assert bars > 50
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


def test_a_label_that_wants_to_be_a_script_is_text(page, pages):
    page.open(pages["odd"])
    page.wait_for(READY)
    assert {SCRIPT, CLOSING} <= set(page.run(LABELS))
    classes = page.run("[...document.querySelectorAll('button[data-class]')].map(b => b.textContent)")  # fmt: skip
    assert sorted(classes) == sorted(CLASSES)
    assert page.run("document.scripts.length") == 2
    assert page.run("document.querySelectorAll('img[src=x], img[onerror]').length") == 0
    assert page.run("document.title") == "odd: kprep report"
    alt = page.run("[...document.images].map(i => i.alt)")
    assert any(SCRIPT in text for text in alt)


def test_filters_by_class_split_and_text(page, pages):
    page.open(pages["odd"])
    page.wait_for(READY)
    choose(page, "of-class", "1")
    assert page.run(LABELS) == [SCRIPT] * 3
    assert page.run("document.getElementById('counted').textContent") == "3 of 13 sampled clips"
    choose(page, "of-split", "val")
    assert page.run(LABELS) == [SCRIPT]
    choose(page, "of-class", "2")
    assert page.run(LABELS) == []
    assert page.run("document.getElementById('nothing').checkVisibility()")
    page.click("#clear")
    assert page.run(f"{SHOWN}.length") == 13
    assert not page.run("document.getElementById('nothing').checkVisibility()")
    write(page, "COPY")
    keys = page.run(f"{SHOWN}.map(b => b.querySelector('.key').textContent)")
    assert sorted(keys) == ["copy0000001_000000_000002", "copy0000002_000000_000002"]
    page.click("button[data-class='0']")  # a class in the table empties the other filters
    assert page.run(LABELS) == ["left"] * 9


def frames_seen(page: Page) -> set[str]:
    """Watch the first clip for as long as it takes to see four frames; return what was seen."""
    return set(page.run(
        f"new Promise(done => {{ const seen = [], b = {SHOWN}[0], at = performance.now();"
        "const look = () => { if (!seen.includes(b.dataset.frame)) seen.push(b.dataset.frame);"
        "if (seen.length > 3 || performance.now() - at > 60000) done(seen); else setTimeout(look, 20); };"
        "look(); })"
    ))  # fmt: skip


POSITION = f"{SHOWN}[0].querySelector('img').style.objectPosition"


def test_pointing_at_a_clip_plays_it_and_leaving_stops(page, pages):
    page.open(pages["odd"])
    page.wait_for(READY)
    rest, frame = page.run(POSITION), page.run(f"{SHOWN}[0].dataset.frame")
    page.point_at("#grid .clip")
    seen = frames_seen(page)
    assert len(seen) >= 4
    assert len({page.wait_for(f"{POSITION} !== {json.dumps(rest)} && {POSITION}"), rest}) == 2
    page.point_at("h1")
    page.wait_for(f"{POSITION} === {json.dumps(rest)}")
    assert page.run(f"{SHOWN}[0].dataset.frame") == frame == "6"  # the middle of twelve


def test_the_keyboard_reaches_and_plays_a_clip(page, pages):
    page.open(pages["odd"])
    page.wait_for(READY)
    page.point_at("h1")
    page.click("#clear")
    page.press("Tab")
    assert page.run(f"document.activeElement === {SHOWN}[0]")
    page.press("Enter")
    assert page.run(f"{SHOWN}[0].getAttribute('aria-pressed')") == "true"
    assert len(frames_seen(page)) >= 4
    page.press("Enter")
    assert page.run(f"{SHOWN}[0].getAttribute('aria-pressed')") == "false"
    assert page.run(f"{SHOWN}[0].dataset.frame") == "6"


def test_a_frame_of_the_sprite_fills_its_box_and_no_more(page, pages):
    """The picture is twelve frames wide and the box shows one of them, whatever its shape."""
    page.open(pages[MOTION])
    page.wait_for(READY)
    shapes = page.run(
        "[...document.querySelectorAll('#grid img')].map(i => { const b = i.getBoundingClientRect(),"
        "f = i.parentElement.getBoundingClientRect();"
        "return [i.naturalWidth / 12 / i.naturalHeight, b.width / b.height,"
        " b.width <= f.width + 0.5 && b.height <= f.height + 0.5]; })"
    )
    assert len(shapes) == 24
    assert len({round(natural, 2) for natural, _, _ in shapes}) > 2  # several shapes are there
    for natural, shown, inside in shapes:
        assert inside
        assert abs(natural - shown) < 0.02 * natural


def test_more_clips_come_on_request(page, pages):
    page.open(pages[MOTION])
    page.wait_for(READY)
    assert page.run(f"{SHOWN}.length") == 24
    assert page.run("document.getElementById('more').textContent") == "Show 48 more of 176"
    page.click("#more")
    assert page.run(f"{SHOWN}.length") == 72
    assert page.run(f"document.activeElement === {SHOWN}[24]")


def test_a_damaged_clip_is_shown_as_such(page, pages):
    page.open(pages["damaged"])
    page.wait_for(READY)
    bad = page.run("[...document.querySelectorAll('.frame.bad')].map(f => f.textContent)")
    assert bad == ["This clip is damaged: its crc32 differs from the index"]
    assert page.run("document.querySelector('#warnings').textContent.includes('1 of the 13 sampled clips cannot be shown')")  # fmt: skip
    page.click("li:has(.bad) button")  # nothing to play, and no error


def test_dark_narrow_and_calm(page, pages):
    page.window(390, 800, dark=True)
    page.open(pages["odd"])
    page.wait_for(READY)
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    red = page.run("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]")
    assert int(red) < 60
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])  # fmt: skip
    page.point_at("#grid .clip")
    assert page.run(f"{SHOWN}[0].dataset.frame") == "6"  # only a press plays it
    page.click("#grid .clip")
    assert len(frames_seen(page)) >= 4


def test_no_request_can_leave_the_page(browser, pages):
    """Even code that ran in the page could not fetch, load or send anything."""
    asked = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET  # noqa: N815 - http.server's name

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        browser.open(pages["odd"])
        browser.wait_for(READY)
        with pytest.raises(PageError, match="Failed to fetch"):
            browser.run(f"fetch('{there}/fetch')")
        refused = browser.run(
            "new Promise(done => { const seen = [];"
            "addEventListener('securitypolicyviolation', e => { seen.push(e.effectiveDirective);"
            "  if (seen.length === 5) done(seen.sort()); });"
            f"const add = (tag, at, path) => {{ const e = document.createElement(tag); e[at] = '{there}/' + path;"
            "  if (tag === 'link') e.rel = 'stylesheet'; document.body.append(e); };"
            "add('img', 'src', 'image'); add('script', 'src', 'script'); add('link', 'href', 'style');"
            "add('iframe', 'src', 'frame');"
            "const inline = document.createElement('script'); inline.textContent = 'document.title = 1';"
            "document.body.append(inline); })"
        )
        assert refused == ["frame-src", "img-src", "script-src-elem", "script-src-elem", "style-src-elem"]  # fmt: skip
        assert browser.run("document.title") == "odd: kprep report"
        assert asked == []
        browser.open(f"{there}/control")  # the listener does hear what leaves
        assert asked[0] == "/control"
    finally:
        server.shutdown()
        server.server_close()
