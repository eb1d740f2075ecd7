"""TensorBoard in a headless browser.

``python -m tests.support.board RUN`` writes the pictures of ``docs/``.
"""

import base64
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tests.support.browser import Browser, find_browser

# Page -> text that shows when the page is complete.
PAGES = {"Scalars": "reward", "Text": "samples/0"}
HARMLESS = ("Three.js", "WebGL")  # warnings of TensorBoard itself


class Board:
    """A TensorBoard server for ``folder`` and a browser page; a context manager."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = self.address.rpartition(":")[2]
        options = f"--host 127.0.0.1 --port {port} --logdir".split()
        command = [sys.executable, "-m", "tensorboard.main", *options, str(folder)]
        self._server = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.browser = Browser(find_browser())
        self.browser.resize(1300)

    def __enter__(self) -> "Board":
        try:
            self._wait(lambda: self.answer("/data/runs"), "TensorBoard read no run")
            self.browser.call("Page.navigate", url=self.address)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.browser.close()
        self._server.terminate()
        self._server.wait(20)

    def answer(self, path: str) -> Any:
        """JSON that the server returns; ``None`` until it is up."""
        try:
            with urlopen(self.address + path, timeout=20) as reply:
                return json.load(reply)
        except URLError:
            return None

    def show(self, page: str, words: str) -> str:
        """Open one of TensorBoard's pages, wait until it shows ``words``, and return its text."""
        tabs = "[...document.querySelectorAll('[role=tab]')]"
        tab = f"{tabs}.find(tab => tab.innerText.toLowerCase() == {page.lower()!r})"
        self._wait(lambda: self.browser.evaluate(f"!!{tab}"), f"no tab {page}")
        x, y = self.browser.evaluate(
            f"(b => [b.x + b.width / 2, b.y + b.height / 2])({tab}.getBoundingClientRect())"
        )
        for event in ("mousePressed", "mouseReleased"):
            self.browser.call(
                "Input.dispatchMouseEvent", type=event, x=x, y=y, button="left", clickCount=1
            )
        self._wait(lambda: words in self._text(), f"{page} does not show {words!r}")
        return self._text()

    def _text(self) -> str:
        """Text of the page, frames and shadow roots included, without line breaks."""
        inside = "n => n.shadowRoot ? [...n.shadowRoot.children].map(all) : []"
        nodes = f"[n, ...n.querySelectorAll('*')].map({inside})"
        body = f"{{ return [n.innerText, ...{nodes}].join('') }}"
        text = f"(function all(n) {body})(document.body)"
        return self.browser.evaluate(text).replace("\n", "")

    def screenshot(self, path: Path) -> None:
        """Write a PNG of the window, after its animations."""
        time.sleep(3)
        path.write_bytes(base64.b64decode(self.browser.call("Page.captureScreenshot")["data"]))

    def _wait(self, done, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, what
            time.sleep(0.3)


def main(run: str) -> None:
    with Board(Path(run)) as board:
        for page, words in PAGES.items():
            board.show(page, words)
            board.screenshot(Path("docs", f"tensorboard-{page.lower().replace(' ', '-')}.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
