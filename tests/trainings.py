"""What tests do with trainings: begin them, kill them, and say what they end with."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from processes import PROJECT, wait_for

from pipelines import checkpoint_format, checkpoints
from pipelines.config import RunConfig
from pipelines.data.shards import create_shards
from pipelines.durable_files import write_json
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import start_or_continue
from pipelines.training import launch
from pipelines.training.journal import read


def directory_of(config: RunConfig) -> RunDirectory:
    return Root(config.root).run(config.name)


def begin(config: RunConfig) -> RunDirectory:
    """A run with its shard set, ready to train."""
    directory = start_or_continue(config)
    shard_set = create_shards(directory.read_config())
    write_json(directory.shard_set_file, {"fingerprint": shard_set.fingerprint, "path": str(shard_set.path)})
    return directory


def train(directory: RunDirectory, until: int | None = None) -> checkpoints.Checkpoint:
    with directory.locked(wait=5) as lock:
        return launch.train(directory, lock, on_line=print, until=until)


TRAIN = """
import sys
from pathlib import Path
from pipelines.run_directory import RunDirectory
from pipelines.training import launch
directory = RunDirectory(Path(sys.argv[1]))
with directory.locked(wait=30) as lock:
    launch.train(directory, lock, on_line=lambda line: print(line, flush=True))
"""


def start(directory: RunDirectory) -> subprocess.Popen[bytes]:
    """`train` in a process of its own, which can be killed."""
    return subprocess.Popen([sys.executable, "-c", TRAIN, str(directory.path)], cwd=PROJECT, start_new_session=True)


def steps_done(directory: RunDirectory) -> int:
    return max((line["step"] for line in read(directory.journal)), default=0)


def beginnings(directory: RunDirectory) -> list[int]:
    """The steps from which ranks have gone on, one for each time that they began, oldest first; 0 is the start."""
    logs = [file.read_text() for file in sorted(directory.logs.glob("attempt_*/output.log"))]
    return [int(step) for log in logs for step in re.findall(r"(?:Resuming|Starting) at step (\d+)", log)]


def ranks_alive(directory: RunDirectory) -> list[int]:
    """The processes that have this run's directory on their command line."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"pipelines.training.worker" in words and os.fsencode(directory.path.absolute()) in words:
                found.append(int(process.name))
    return sorted(found)


def agent_of(directory: RunDirectory) -> int:
    """The process of torchrun itself, which has the ranks' command line in its own."""
    (agent,) = filter(_is_agent, ranks_alive(directory))
    return agent


def _is_agent(process: int) -> bool:
    return b"pipelines.training.agent" in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")


def last_rank(directory: RunDirectory) -> int:
    """The process of one of the ranks: the agent may have the highest number, where numbers begin anew."""
    return max(process for process in ranks_alive(directory) if not _is_agent(process))


def train_and_kill(directory: RunDirectory, at: int, seconds: float = 60) -> int:
    """Train in a process of its own, killed when a step is done, one more at least than there were.

    Returns the last step that was done.
    """
    at, begun = max(at, steps_done(directory) + 1), len(beginnings(directory))
    process = start(directory)
    wait_for(lambda: steps_done(directory) >= at and len(beginnings(directory)) > begun, seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not ranks_alive(directory), 30)
    return steps_done(directory)


def result(directory: RunDirectory) -> dict[str, str]:
    """The digests of everything that training computes, timings apart."""
    last = checkpoints.latest(directory)
    assert last is not None
    files = {
        name: hashlib.sha256((last.path / name).read_bytes()).hexdigest()
        for name in (checkpoint_format.WEIGHTS, checkpoint_format.STATE_TENSORS, checkpoint_format.STATE_SCALARS)
    }
    timings = {"time", "train/images_per_second", "train/data_wait_fraction", "train/decoding_fraction"}
    lines = [
        {k: v for k, v in line.items() if k not in timings and not k.startswith("system/")}
        for line in read(directory.journal)
    ]
    return files | {"journal": str(lines)}


class Undisturbed:
    """What trainings end with that nothing disturbs, for those to be compared with that something has disturbed.

    Each is trained once for all tests, in a root of its own; what its name and its root are changes nothing.
    """

    def __init__(self, root: Path):
        self._root = root
        self._known: dict[str, dict[str, str]] = {}

    def __call__(self, config: RunConfig) -> dict[str, str]:
        key = json.dumps(config.model_dump(mode="json", exclude={"name", "root"}), sort_keys=True)
        if key not in self._known:
            name = f"undisturbed-{len(self._known)}"
            directory = begin(config.model_copy(update={"name": name, "root": self._root}))
            train(directory)
            self._known[key] = result(directory)
        return self._known[key]
