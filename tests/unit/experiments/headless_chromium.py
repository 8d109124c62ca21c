"""A page in a real browser: headless Chromium, spoken to over two pipes (the DevTools protocol, no package needed)."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

A4_LANDSCAPE = (297 - 24, 210 - 24)  # millimetres inside the margins
PIXELS_PER_MM = 96 / 25.4
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_QUIET = (
    "--headless --disable-gpu --no-sandbox --disable-dev-shm-usage --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-extensions --remote-debugging-pipe"
).split()


CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")


class Browser:
    """One page, offline. `events`: everything the browser has reported so far, in order: (method, parameters)."""

    def __init__(self, folder: Path) -> None:
        read_commands, self._commands = os.pipe()
        self._answers, write_answers = os.pipe()
        launch = f'exec 3<&{read_commands} 4>&{write_answers}; exec "$0" "$@"'
        command = ["bash", "-c", launch, CHROMIUM, *_QUIET, f"--user-data-dir={folder}", "about:blank"]
        self._log = (folder.parent / f"{folder.name}.log").open("wb")
        self._process = subprocess.Popen(
            command, pass_fds=(read_commands, write_answers), stdout=self._log, stderr=self._log
        )
        os.close(read_commands)
        os.close(write_answers)
        self._number, self._rest = 0, b""
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._session: str | None = None
        (page,) = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._commands)
        os.close(self._answers)
        self._log.close()

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._answers, 1 << 20)
            assert chunk, f"the browser has ended: {Path(self._log.name).read_text()[-2000:]}"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, page: Path) -> None:
        """Load a page, and wait until it is complete."""
        self("Page.navigate", url=page.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._next()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON."""
        result = self("Runtime.evaluate", expression=f"JSON.stringify({expression})")
        assert "exceptionDetails" not in result, result
        return json.loads(result["result"]["value"])

    def heights(self, what: str) -> list[float]:
        """Of the elements that a CSS selector finds, in pixels."""
        return self.evaluate(f"[...document.querySelectorAll('{what}')].map(e => e.getBoundingClientRect().height)")

    def lay_out_for_print(self, width: int, height: int) -> int:
        """Lay the page out as it prints on paper of this size in pixels; return how many elements stick out at a
        side."""
        self("Emulation.setEmulatedMedia", media="print")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        return self.evaluate(
            "[...document.querySelectorAll('table, svg, p, dd, li')].map(e => e.getBoundingClientRect())"
            f".filter(b => b.right > {width} + 0.5 || b.left < -0.5).length"
        )

    def complaints(self) -> list[str]:
        """Errors and warnings of the console, exceptions, failed requests."""
        found = []
        for method, parameters in self.events:
            is_bad_log = method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning")
            is_bad_call = method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert")
            if is_bad_log or is_bad_call or method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
                found.append(f"{method}: {parameters}")
        return found

    def requests(self) -> list[str]:
        """URLs that the page has asked for."""
        return [p["request"]["url"] for method, p in self.events if method == "Network.requestWillBeSent"]

    def screenshot(self) -> bytes:
        """PNG of the whole page."""
        return base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """The page as it prints, with the page size that it asks for."""
        return base64.b64decode(self("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])
