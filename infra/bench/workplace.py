"""Where a benchmark works: its folder under the root, the interpreters, the photographs, and how much is measured."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.bench.contender import Program
from infra.bench.photographs import sheets
from infra.bench.rounds import Rounds, measured
from infra.bench.scale import Scale

OURS = "codecmill"


@dataclass(frozen=True)
class Workplace:
    """What every group of measurements is given.

    Attributes:
        folder: `<root>/bench`.
        peers: the interpreter of the peers' environment.
        photographs: what the sheets are cut from.
    """

    folder: Path
    peers: Path
    photographs: list[Path]
    scale: Scale

    @property
    def work(self) -> Path:
        """What is measured with; gone when the benchmark is done."""
        return self.folder / "work"

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    def sheets(self, patches: int) -> list[str]:
        """Files of photographs that make at least so many patches."""
        return [str(path) for path in sheets(self.folder / "photographs", self.photographs, patches)]

    def of_ours(self, name: str, module: str, cores: int | None = None, **parameters: Any) -> Program:
        """A program in codecmill's environment, with a folder of its own to work in."""
        return self._program(name, module, Path(sys.executable), cores, parameters)

    def of_peers(self, name: str, module: str, cores: int | None = None, **parameters: Any) -> Program:
        """A program in the peers' environment, with a folder of its own to work in."""
        return self._program(name, module, self.peers, cores, parameters)

    def _program(self, name: str, module: str, python: Path, cores: int | None, parameters: dict[str, Any]) -> Program:
        own = "".join(letter if letter.isalnum() else "-" for letter in name)
        return Program(name, module, python, {"folder": str(self.work / "contenders" / own), **parameters}, cores)

    def measured(self, title: str, programs: list[Program], rounds: int) -> Rounds:
        return measured(title, programs, rounds, self.scale.repeats, self.folder / "logs")
