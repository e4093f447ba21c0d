"""A headless Chromium, driven over the WebDriver protocol with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

DRIVER = shutil.which("chromedriver")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ABSENT = "needs Chromium and its driver: apt-get install chromium chromium-driver"
ARGUMENTS = [
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-proxy-server", "--disable-dev-shm-usage",
]  # fmt: skip


class Browser:
    """One window. A context manager: the browser and its driver end with it."""

    def __init__(self, width: int = 1400, height: int = 900, dark: bool = False):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        arguments = [*ARGUMENTS, f"--window-size={width},{height}", f"--user-data-dir={self.profile.name}"]
        arguments += ["--no-sandbox"] * (os.name == "posix" and os.geteuid() == 0)
        arguments += ["--blink-settings=preferredColorScheme=0"] * dark
        options = {"binary": CHROMIUM, "args": arguments}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        command, quiet = [DRIVER, "--port=0"], subprocess.DEVNULL
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True)
        try:
            self.root = f"http://127.0.0.1:{self._port()}"
            made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.root += f"/session/{made['sessionId']}"
            self.open("about:blank")  # leaves the browser's own start page
            self.console(), self.requests()
        except BaseException:
            self._end()
            raise

    def _port(self) -> str:
        for line in self.driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                return found[1]
        raise RuntimeError("chromedriver did not start")

    def _ask(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str) -> None:
        """Load a page and wait until it is there."""
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments):
        """The value of a function's body of JavaScript."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{next(iter(found.values()))}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Keys into an element."""
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        self._ask("POST", f"/element/{next(iter(found.values()))}/value", {"text": text})

    def console(self) -> list[dict]:
        """What was written to the console since the last call, errors of the page included."""
        return self._ask("POST", "/se/log", {"type": "browser"})

    def requests(self) -> list[str]:
        """Addresses asked for since the last call."""
        events = (json.loads(e["message"])["message"] for e in self._ask("POST", "/se/log", {"type": "performance"}))
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def screenshot(self, path: Path) -> None:
        """The window as PNG."""
        path.write_bytes(base64.b64decode(self._ask("GET", "/screenshot")))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_) -> None:
        try:
            self._ask("DELETE", "")
        finally:
            self._end()

    def _end(self) -> None:
        self.driver.terminate()
        self.driver.wait(10)
        self.driver.stdout.close()
        self.profile.cleanup()
