"""Debian's Chromium without a window, driven by the W3C's WebDriver protocol (JSON over HTTP)."""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
MISSING = [name for name, path in PROGRAMS.items() if not path]
REASON = f"no {' and no '.join(MISSING)} here (Debian: apt-get install chromium chromium-driver)"
KEYS = {"Tab": "\ue004", "Enter": "\ue007", "End": "\ue010", "Home": "\ue011", "ArrowRight": "\ue014",
        "ArrowDown": "\ue015"}  # fmt: skip


class Browser:
    """One page in it."""

    def __init__(self, server: str) -> None:
        self.base = f"{server}/session"
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"binary": PROGRAMS["chromium"], "args": flags}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self.post("", capabilities={"alwaysMatch": wanted})["sessionId"]
        self.base = f"{self.base}/{session}"

    def post(self, path: str, **body: Any) -> Any:
        return self._ask(urllib.request.Request(self.base + path, json.dumps(body).encode(), method="POST"))

    def _ask(self, request: urllib.request.Request) -> Any:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """As on a screen of so many pixels."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        prefers = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=prefers)
        self.post("/url", url=page.as_uri())

    def command(self, name: str, **parameters: Any) -> Any:
        """Of Chromium's own protocol."""
        return self.post("/goog/cdp/execute", cmd=name, params=parameters)

    def run(self, script: str) -> Any:
        """What a function of this body returns."""
        return self.post("/execute/sync", script=script, args=[])

    def press(self, *keys: str) -> None:
        strokes = [{"type": kind, "value": KEYS[key]} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def complaints(self) -> list[str]:
        """What the console has got since it was last asked."""
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def screenshot(self, path: Path, height: int) -> None:
        """Of the page down to so many pixels."""
        width = self.run("return innerWidth")
        area = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.command("Page.captureScreenshot", clip=area, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        self._ask(urllib.request.Request(self.base, method="DELETE"))


@contextmanager
def chromium() -> Iterator[Browser]:
    with subprocess.Popen(
        [str(PROGRAMS["chromedriver"]), "--port=0"], stdout=subprocess.PIPE, text=True
    ) as driver:
        try:
            said = (re.search(r"on port (\d+)\.", line) for line in driver.stdout)
            port = next(found[1] for found in said if found)
            browser = Browser(f"http://127.0.0.1:{port}")
            try:
                yield browser
            finally:
                browser.close()
        finally:
            driver.terminate()
