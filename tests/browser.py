"""Pages as people see them: a headless Chromium, spoken to by its DevTools protocol."""

import base64
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for
from websockets.sync.client import connect
from websockets.sync.connection import Connection

HAS_PICTURE = "[...document.images].some(each => {} && each.complete && each.naturalWidth > 0)"


class Page:
    """A tab of the browser, which names itself to servers by a user and a password."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._number = 0

    def call(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while (answer := json.loads(self._connection.recv(timeout=30))).get("id") != self._number:
            pass  # what else happens in the tab
        return answer["result"]

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")

    def links(self) -> list[str]:
        """Where the page's links lead."""
        return json.loads(self.value("JSON.stringify([...document.links].map(each => each.href))"))

    def open(self, url: str, login: str, *texts: str, picture: str | None = None, seconds: float = 40) -> str:
        """Open a page; returns all of its text, once that has `texts` and a picture is shown.

        Args:
            login: user:password.
            picture: what tells the picture, in JavaScript, of `each` image.
        """
        token = base64.b64encode(login.encode()).decode()
        self.call("Network.setExtraHTTPHeaders", headers={"Authorization": f"Basic {token}"})
        self.call("Page.navigate", url="about:blank")  # what differs behind the # alone is no other page
        self.call("Page.navigate", url=url)
        shows = HAS_PICTURE.replace("{}", picture) if picture else "true"

        deadline = time.monotonic() + seconds
        while True:
            text = self.value("document.body?.innerText") or ""
            if all(each in text for each in texts) and self.value(shows):
                return text
            assert time.monotonic() < deadline, f"{url} has not all of {texts} and its picture, but says:\n{text}"
            time.sleep(0.2)


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with a profile of its own in a folder; skips the test where there is none."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium is installed: see infra/test-packages")
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,2400"]
    command += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-port=0", "about:blank"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        port_file = folder / "profile" / "DevToolsActivePort"
        wait_for(lambda: port_file.is_file() and "\n" in port_file.read_text(), 30)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
            (tab,) = (each for each in json.load(answer) if each["type"] == "page")
        with connect(tab["webSocketDebuggerUrl"], max_size=None) as connection:
            page = Page(connection)
            page.call("Network.enable")
            yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
