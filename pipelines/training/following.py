"""What is heard from the ranks while they train: their lines, their steps, and why one failed."""

import contextlib
import json
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM, Signals
from typing import Any

from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError, RankFailure
from pipelines.progress import Progress, report
from pipelines.tolerant_reading import journal_entry

Listen = Callable[[str], None]

EXIT_CODES = "exit_codes.json"
"""What torchrun says of the ranks that failed, in an attempt's folder."""

ATTEMPT = "CODECMILL_ATTEMPT"
"""The environment variable by which torchrun's process knows that folder."""

LEAVE = ".tmp-leave"
"""While this file is in an attempt's folder, the ranks of its host save and end; those of other hosts may go on."""

STOPPED = "stopped"
"""This file in an attempt's folder says that its ranks ended because the run was to stop."""

LOST = 75
"""The exit code of an agent that has lost the rendezvous, or found it closed; sysexits.h calls it EX_TEMPFAIL."""

SPOKEN = b"codecmill-failure "
"""Begins the line with which a rank that cannot write down why it failed, as on a full disk, says it."""

TORCHRUN_PATIENCE = 25.0
"""Seconds; a little less than torchrun waits for the others when a rank has failed, before it kills them."""

SHOWN = {
    "train/loss": "loss",
    "train/psnr": "psnr",
    "validation/psnr": "validation_psnr",
    "train/images_per_second": "images/s",
}


@dataclass(frozen=True)
class Ending:
    """How the ranks ended.

    Attributes:
        code: torchrun's exit code.
        hung: a sentence for each rank that was killed because it hung, since the last restart.
        spoken: failures that ranks could only say, as they would have been written down.
        restart: how often torchrun had started the ranks anew.
    """

    code: int
    hung: Sequence[str]
    spoken: Sequence[dict[str, Any]]
    restart: int = 0


class RankOutput:
    """Writes what the ranks print to a file and passes it on, line by line, in the caller's thread."""

    def __init__(self, process: subprocess.Popen[bytes], file: Path, on_line: Listen):
        self._lines: deque[str] = deque()
        self._on_line = on_line
        self.spoken: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, args=(process, file), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes], file: Path) -> None:
        assert process.stdout is not None  # noqa: S101  # it was opened as a pipe
        with file.open("ab", buffering=0) as log, process.stdout as stream:
            for line in stream:
                if line.startswith(SPOKEN):
                    self.spoken.append(json.loads(line.removeprefix(SPOKEN)))
                    continue
                # On a full disk the lines still reach whoever listens.
                with contextlib.suppress(OSError):
                    log.write(line)
                self._lines.append(line.decode("utf-8", "replace").rstrip())

    def pass_on(self) -> str:
        """Pass on what has come since the last call; returns the last line of it."""
        last = ""
        while self._lines:
            last = self._lines.popleft()
            self._on_line(last)
        return last

    def close(self) -> None:
        self._reader.join(timeout=10)
        self.pass_on()


class StepProgress:
    """Reports the steps that the journal gains."""

    def __init__(self, journal: Path, total: int):
        self._journal = journal
        self._total = total
        self._offset = 0
        self.done = 0
        self._values: dict[str, float] = {}
        self._message = "Starting the ranks"
        self._reported: tuple[int, str] | None = None

    def report(self, message: str) -> None:
        """Report if there is something new: a step done, or a line worth showing."""
        self._read()
        self._message = message or ("" if self.done else self._message)
        if (self.done, self._message) != self._reported:
            self._reported = (self.done, self._message)
            report(Progress("training", self.done, self._total, "steps", self._message, dict(self._values)))

    def _read(self) -> None:
        if not self._journal.is_file():
            return
        with self._journal.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        for entry in filter(None, map(journal_entry, whole.splitlines())):
            self.done = entry["step"]
            self._values |= {shown: entry[name] for name, shown in SHOWN.items() if name in entry}


def explanation(attempt: Path, ending: Ending) -> CodecmillError | None:
    """What the first rank that knew why it ended has said of it."""
    said = next((each for each in _failures(attempt, ending) if each["explained"]), None)
    if said is None:
        return None
    error = CodecmillError(str(said["message"]))
    error.exit_code, error.may_pass = said["exit_code"], said["may_pass"]
    return error


def _failures(attempt: Path, ending: Ending) -> list[dict[str, Any]]:
    """Those of the last restart, in the order of time."""
    failures = [read_json(file) for file in attempt.glob("failure_*.json")] + list(ending.spoken)
    last = max(ending.restart, *(each["restart"] for each in failures), 0)
    return sorted((each for each in failures if each["restart"] == last), key=lambda each: each["monotonic"])


def failure(attempt: Path, ending: Ending) -> CodecmillError:
    """Why the ranks ended, from what they and torchrun left in the attempt's folder: the first cause alone.

    A RankFailure where a rank was killed, which may go better another time; what a rank raised would be raised again.
    """
    output = f"All output is in {attempt / 'output.log'}."
    explained = explanation(attempt, ending)
    if explained is not None:
        return explained
    failures = _failures(attempt, ending)
    if ending.hung:
        return RankFailure(f"{ending.hung[-1]} {output}")
    exit_codes = read_json(attempt / EXIT_CODES) if (attempt / EXIT_CODES).is_file() else {}
    # SIGTERM is how torchrun ends the others, SIGKILL after 30 s; and what they raise when a peer is gone is no cause.
    killed = [(rank, -exit_code) for rank, exit_code in exit_codes.items() if exit_code < 0 and -exit_code != SIGTERM]
    raised_long_ago = bool(failures) and time.monotonic() - failures[0]["monotonic"] > TORCHRUN_PATIENCE
    if killed and not raised_long_ago:
        rank, number = killed[0]
        return RankFailure(f"Rank {rank} was killed by {Signals(number).name}, for want of memory perhaps. {output}")
    if not failures:
        return RankFailure(f"The ranks ended without saying why (exit code {ending.code}). {output}")
    return CodecmillError(f"Rank {failures[0]['rank']} failed:\n{failures[0]['traceback'].rstrip()}\n{output}")
