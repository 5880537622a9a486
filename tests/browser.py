"""A headless Chromium over its DevTools protocol, for tests of the page. Nothing to install but the browser."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio", "--remote-debugging-port=0"]
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a picture that moves, and nobody to ask
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"]


def chromium() -> str | None:
    """The browser's path, where this machine has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. `problems` are the page's errors: what its console and its scripts complained of."""

    def __init__(self, folder: Path, size: tuple[int, int] = (1280, 900)):
        path = chromium()
        assert path is not None
        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        self.problems: list[str] = []
        flags = [*FLAGS, *CAMERA, *QUIET, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={folder / 'profile'}", "about:blank"]
        self._process = subprocess.Popen([path, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        address = next(found[1] for line in self._process.stderr if (found := re.search(r"DevTools listening on ws://([^/]+)/", line)))
        pages = httpx.get(f"http://{address}/json/list", timeout=60).json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        self._stack = contextlib.ExitStack()
        self._socket = self._stack.enter_context(connect(address, max_size=None))
        self._numbers = itertools.count(1)
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            about = message.get("params", {})
            if message["method"] == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(about["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded" and about["entry"]["level"] == "error":
                self.problems.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 60.0) -> Any:
        """The value of an expression as soon as it is true in the page."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"), self.problems)
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of an element, which must be what lies there."""
        place = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getBoundingClientRect(), x = r.x + r.width / 2, y = r.y + r.height / 2;"
            "return {x, y, hit: e.contains(document.elementFromPoint(x, y))}; })()"
        )
        assert place["hit"], f"{selector} is covered"
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place["x"], y=place["y"], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, code: int = 0) -> None:
        """A key, such as "Enter" with code 13, or a letter."""
        written = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **written)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def downloaded(self, name: str, seconds: float = 60.0) -> str:
        """The text of a file that was downloaded."""
        path, end = self.downloads / name, time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < end, list(self.downloads.iterdir())
            time.sleep(0.05)
        return path.read_text(encoding="utf-8")

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        self._stack.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()
