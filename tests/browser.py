"""A headless Chromium for tests, driven with the Chrome DevTools protocol over two pipes.

No package is needed: messages are JSON, each ended by a zero byte, on file descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from conftest import without

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_SECONDS = 120  # of patience; a page answers in milliseconds, a busy machine does not


class PageError(AssertionError):
    """The page raised an exception, or the browser refused a command."""


def find_browser() -> str | None:
    """Return the path of a Chromium, or None."""
    named = os.environ.get("KPREP_CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


def browser_for_tests() -> str:
    """Return the path of a Chromium; without one, skip the test, or fail it where CI=true."""
    path = find_browser()
    if path is None:
        missing = (
            f"no Chromium ({', '.join(NAMES)}) on the PATH; install one, or set KPREP_CHROMIUM"
        )
        without(missing)
    return path


class Page:
    """One tab: what it shows, and every request that it makes."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.loaded = False

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; return its result. Events that arrive meanwhile are kept."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise PageError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], _SECONDS)[0]:
                raise TimeoutError(f"the browser said nothing for {_SECONDS} s")
            received = os.read(self._answers, 1 << 20)
            if not received:
                raise ConnectionError("the browser ended")
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        self._note(answer.get("method"), answer.get("params", {}))
        return answer

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(params["exceptionDetails"]))
        elif method in ("Log.entryAdded", "Runtime.consoleAPICalled"):
            self.messages.append(json.dumps(params))
        elif method == "Page.loadEventFired":
            self.loaded = True

    def attach(self) -> None:
        """Open a tab and listen to what it does."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]  # fmt: skip
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def open(self, url: str) -> None:
        """Load an address and wait until it is there."""
        self.loaded = False
        self.call("Page.navigate", url=url)
        while not self.loaded:
            self._next()

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page, awaiting a promise; return its value."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True,
                           awaitPromise=True)  # fmt: skip
        if "exceptionDetails" in answer:
            raise PageError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Evaluate until the value is true; return it."""
        deadline = time.monotonic() + _SECONDS
        while not (value := self.run(script)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never true: {script}")
            time.sleep(0.05)
        return value

    def window(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """Give the page a size in CSS pixels and a colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=scale, mobile=False)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def place_of(self, selector: str) -> tuple[float, float]:
        """Scroll an element into view; return its middle."""
        where = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return where[0], where[1]

    def point_at(self, selector: str) -> None:
        """Move the mouse over an element."""
        x, y = self.place_of(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Press the left button over an element."""
        x, y = self.place_of(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Press a key such as Tab, Enter or a letter."""
        codes = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}
        code, typed = codes.get(key, (ord(key[0].upper()), key))
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=typed, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self) -> bytes:
        """Return a PNG of what the window shows."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def chromium(path: str) -> Iterator[Page]:
    """Run a browser with an empty profile and one tab; it is killed at the end."""
    commands_in, commands_out = os.pipe()
    answers_in, answers_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        arguments = [
            path, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}",
            "--no-sandbox",  # refused to root, which CI often is; the page is our own
            "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--no-proxy-server",
        ]  # fmt: skip
        # The pipe must be descriptors 3 and 4 of the browser; a shell-less way to get them there
        move = (
            "import fcntl, os, sys\n"
            "high = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]\n"
            "os.dup2(high[0], 3)\nos.dup2(high[1], 4)\nos.execvp(sys.argv[3], sys.argv[3:])"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", move, str(commands_in), str(answers_out), *arguments],
            pass_fds=(commands_in, answers_out), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(commands_in)
        os.close(answers_out)
        try:
            page = Page(commands_out, answers_in)
            page.attach()
            yield page
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
            os.close(commands_out)
            os.close(answers_in)
