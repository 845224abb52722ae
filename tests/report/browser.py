"""A headless Chromium driven through its DevTools pipe, with the standard library only."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--mute-audio"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--hide-scrollbars"),
)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next((path for path in map(shutil.which, _NAMES) if path), None)


_WITH_PIPES = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for place, end in zip((3, 4), ends):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads its commands from descriptor 3 and answers on 4."""


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End a browser with all the processes that it has started, also those in groups of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10.0
    while left := processes_of(folder):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {left} of the browser are still there")
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.02)


def processes_of(folder: Path) -> list[int]:
    """The processes whose home is this folder, so far as /proc tells; the dead count no more."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"HOME={folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


class Browser:
    """One page of a browser.

    `complaints` are the errors and warnings that its console and its loader told of, `requests` the addresses that it
    asked for. Its profile and whatever else it writes go to `folder`, which must be its own.
    """

    def __init__(self, executable: str, folder: Path, *, flags: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._command = (executable, *_FLAGS, *flags, "--remote-debugging-pipe")
        self._numbers = itertools.count(1)
        self._rest = b""
        self._events: list[Mapping[str, Any]] = []
        self._stack = contextlib.ExitStack()
        self._session = ""

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        for end in (self._in, self._out):
            stack.callback(os.close, end)
        arguments = [*self._command, f"--user-data-dir={self.folder / 'profile'}", "about:blank"]
        process = subprocess.Popen(
            [sys.executable, "-c", _WITH_PIPES, str(to_browser), str(from_browser), *arguments],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # Its socket lies in the temporary folder, and the whole path to a socket has 108 bytes at most.
            env={**os.environ, "HOME": str(self.folder), "TMPDIR": "."},
            cwd=self.folder,
        )
        stack.callback(_end, process, self.folder)
        os.close(to_browser)
        os.close(from_browser)
        targets = self._ask("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Load a file and wait until it is there."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.prefer(scheme)
        self._events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._wait_event("Page.loadEventFired", 60.0)

    def prefer(self, scheme: str, media: str = "") -> None:
        """Ask for the light or the dark colours; `media` is "print" or nothing."""
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 60.0) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.value(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{expression} is still false; the console says {self.complaints}")
            time.sleep(0.1)

    def press(self, key: str) -> None:
        """Press and release a key, such as "Enter" or "ArrowDown"."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = {"Enter": 13, " ": 32, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)

    def screenshot(self, path: Path, *, is_whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))

    def call(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """Send a command of the DevTools protocol to the page and return its result."""
        return self._ask(method, self._session, **parameters)

    def _ask(self, method: str, session: str | None = None, /, **parameters: Any) -> Mapping[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive(60.0)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: Mapping[str, Any] = answer["result"]
                return result

    def _wait_event(self, method: str, timeout_s: float) -> None:
        while not any(event.get("method") == method for event in self._events):
            self._receive(timeout_s)

    def _receive(self, timeout_s: float) -> Mapping[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], timeout_s)[0]:
                raise TimeoutError("the browser does not answer")
            block = os.read(self._in, 1 << 20)
            if not block:
                raise RuntimeError("the browser has ended")
            self._rest += block
        text, _, self._rest = self._rest.partition(b"\0")
        message: Mapping[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
            self._note(message["method"], message["params"])
        return message

    def _note(self, method: str, parameters: Mapping[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(argument.get("value")) for argument in parameters["args"]))
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])
