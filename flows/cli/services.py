"""Servers that codecmill starts for itself: on 127.0.0.1, waited for until they answer, gone when it is gone."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipelines.errors import CodecmillError
from pipelines.process_lifetime import with_our_sources

HOST = "127.0.0.1"
START_SECONDS = 180.0
"""How long a server may take to answer. A first start on a loaded machine was seen to take 75 s."""

_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
"""The keeper's exit codes where it or the program was killed, of which neither could say anything."""


GRACE_SECONDS = 5.0
"""How long a server may take to end by itself, as a rule."""


class Service:
    """One server under a keeper, its output in a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        port: int,
        health: str | Callable[[], bool],
        log: Path,
        keeps_log: bool = False,
        held: int | None = None,
        grace: float = GRACE_SECONDS,
    ):
        """Start it.

        Args:
            health: the path that answers 200 once it is ready, or what finds out whether it is.
            keeps_log: its output stays, also where all went well.
            held: a descriptor that stays open until the server and all that it started are gone, as of a lock.
            grace: seconds that it may take to end by itself.
        """
        self.name = name
        self.port = port
        self.log = log
        self._keeps_log = keeps_log
        self._health = health
        self._grace = grace
        self._group: int | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli.keeper", str(grace), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment, **with_our_sources()},
                start_new_session=True,
                pass_fds=() if held is None else (held,),
            )

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.port}"

    def wait_ready(self) -> None:
        """Return when the server answers.

        Raises:
            CodecmillError: it ended, or did not answer in time; the message has its last line.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            self.check()
            if time.monotonic() > deadline:
                self._keeps_log = True
                raise CodecmillError(f"{self.name} did not answer within {START_SECONDS:.0f} s. Its output: {self.log}")
            time.sleep(0.05)

    def check(self) -> None:
        """Say so when the server has ended.

        Raises:
            CodecmillError: it has.
        """
        code = self.process.poll()
        if code is None:
            self._group = self._group or _child_of(self.process.pid)
        else:
            self._keeps_log = True
            last = "" if code in _KILLED else self._last_words()
            raise CodecmillError(f"{self.name} ended with exit code {code}.{last} All of its output: {self.log}")

    def _last_words(self) -> str:
        """Its last line that may say why it ended, as a sentence; no word of flow runs, which a worker passes on."""
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines()]
        spoken = [line for line in lines if line and "| INFO " not in line]
        return f" Its last line: {spoken[-1][:300].rstrip('.')}." if spoken else ""

    def _answers(self) -> bool:
        if callable(self._health):
            return self._health()
        connection = http.client.HTTPConnection(HOST, self.port, timeout=2)
        try:
            connection.request("GET", self._health)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self) -> None:
        """End the server and all that it started; its output is kept only if it failed."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=self._grace + 15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._group is not None and self.process.returncode < 0:
            # Killed, the keeper cannot end what its program started; the program leads the group of all of it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)
        if not self._keeps_log:
            with contextlib.suppress(FileNotFoundError):
                self.log.unlink()


def _child_of(keeper: int) -> int | None:
    """The program that a keeper has started."""
    try:
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(children[0]) if children else None


def free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there, else any free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted))
        except OSError:
            probe.bind((HOST, 0))
        return probe.getsockname()[1]
