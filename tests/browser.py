"""A real browser for tests: headless Chromium, driven by its own driver."""

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# As root and in containers there is no sandbox.
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


class Browser:
    """A window."""

    def __init__(self, address: str) -> None:
        self._address = address
        options = {"binary": CHROMIUM, "args": ARGUMENTS}
        wishes = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._post("", {"capabilities": {"alwaysMatch": wishes}})["sessionId"]
        self._address = f"{address}/{session}"

    def open(self, page: Path) -> None:
        self._post("/url", {"url": page.as_uri()})
        assert self.run("return document.readyState") == "complete"

    def run(self, script: str, *args: object) -> Any:
        """What a script returns; a promise is waited for."""
        return self._post("/execute/sync", {"script": script, "args": args})

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse."""
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
        self._post("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def resize(self, width: int, height: int) -> None:
        self._post("/window/rect", {"width": width, "height": height})

    def complaints(self) -> list[str]:
        """What the page's scripts and the browser complained of since this was last asked."""
        return [entry["message"] for entry in self._post("/se/log", {"type": "browser"})]

    def close(self) -> None:
        request = urllib.request.Request(self._address, method="DELETE")
        urllib.request.urlopen(request).close()

    def _post(self, path: str, body: object) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, method="POST")
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["value"]


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is there while the block runs."""
    assert DRIVER is not None
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert driver.stdout is not None
            line = next(line for line in driver.stdout if "started successfully on port" in line)
            port = int(line.split("port")[1].strip(" .\n"))
            window = Browser(f"http://127.0.0.1:{port}/session")
            yield window
            window.close()
        finally:
            driver.terminate()
