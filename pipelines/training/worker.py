"""What torchrun starts on each rank: `python -m pipelines.training.worker RUN_DIRECTORY ATTEMPT_FOLDER [UNTIL]`."""

import json
import logging
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pipelines.durable_files import write_json
from pipelines.errors import CodecmillError
from pipelines.event_log import EventLog, events
from pipelines.process_lifetime import die_with_parent
from pipelines.process_memory import collect_rarely, keep_freed_memory
from pipelines.run_directory import RunDirectory
from pipelines.training.following import LEAVE, SPOKEN, STOPPED
from pipelines.training.heartbeat import Beat, open_heartbeat

if TYPE_CHECKING:
    from pipelines.training.agreement import Stop


class StopSignals:
    """Turns SIGTERM, SIGINT and two files into a wish to stop, which the loop grants at its next step."""

    def __init__(self, run: Path, host: Path):
        self._run = run
        self._host = host
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> "Stop":
        from pipelines.training.agreement import Stop

        if self._run.exists():
            return Stop.THE_RUN
        return Stop.THESE_RANKS if self._signalled or self._host.exists() else Stop.NO


def main(run: Path, attempt: Path, until: int | None = None) -> None:
    die_with_parent()
    keep_freed_memory()
    collect_rarely()
    directory = RunDirectory(run)
    try:
        beat = open_heartbeat(attempt, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), _restart())
        stop_requested = StopSignals(directory.stop_request, attempt / LEAVE)
        _print_warnings()
        with events(directory, int(os.environ["RANK"])) as log:
            if _train(directory, beat, stop_requested, until, log):
                (attempt / STOPPED).touch()
    except Exception as error:
        _record_failure(attempt, _in_words(error, directory))
        sys.stdout.flush()
        os._exit(1)  # an orderly exit would take leave of the other ranks, and may wait for them
    sys.stdout.flush()
    # Nor at a good end: a thread of gloo that is about to let a tensor go wants the interpreter for it, and aborts the
    # process where that is ending. torchrun would then end the first rank too, which may be saving.
    os._exit(0)


def _print_warnings() -> None:
    """As Python does by itself where no handler at all listens."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)


def _train(directory: RunDirectory, beat: Beat, stop_requested: StopSignals, until: int | None, log: EventLog) -> bool:
    """Returns whether the whole run was asked to stop."""
    import torch

    from pipelines.data.shard_set import ShardSet
    from pipelines.training.agreement import Stop
    from pipelines.training.distributed import process_group
    from pipelines.training.journal import Journal
    from pipelines.training.machine import compute_exactly, take_own_cores
    from pipelines.training.preparation import prepare
    from pipelines.training.writing import sole_writer

    config = directory.read_config()
    training = config.training
    if training.threads == "auto":
        raise CodecmillError(
            f"{directory.config_file} still says 'auto' for training.threads; start it with codecmill."
        )
    # Where a CUDA compiler is but no GPU, compiling would warn of it.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if training.device == "cpu":
        take_own_cores(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    torch.set_num_threads(training.threads)
    compute_exactly()
    shard_set = ShardSet.open(directory.shard_set())
    with process_group(str(training.device)) as ranks, sole_writer(directory, ranks) as check_writer:
        if ranks.is_first and training.compile:
            print("Compiling the training step", flush=True)
        state = prepare(directory, config, shard_set, ranks, beat)
        state.check_writer = check_writer
        begun = f"Resuming at step {state.step}" if state.step else "Starting at step 0"
        begun += f"{_hosts(training.nodes)}, warmed up in {state.warm_up_seconds:.1f} s"
        log.write(begun, stage="training", step=state.step)
        if ranks.is_first:
            print(begun, flush=True)
        with Journal(directory.journal, state.step) if ranks.is_first else nullcontext() as journal:
            return state.run(stop_requested, journal, until) == Stop.THE_RUN


def _hosts(nodes: int) -> str:
    return f" on {os.environ['GROUP_WORLD_SIZE']} of {nodes} hosts" if nodes > 1 else ""


def _in_words(error: Exception, directory: RunDirectory) -> Exception:
    """The same error, or, of a GPU that is full, what a run may do about it."""
    torch = sys.modules.get("torch")  # where it cannot be loaded, that is the error
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return error
    training = directory.read_config().training
    share = "" if training.parallel == "fsdp" else ", or share the weights out, too, with --training.parallel fsdp"
    found = CodecmillError(
        f"The GPU has no room for a step of training.batch_size {training.batch_size} and training.crop_size "
        f"{training.crop_size} on training.processes {training.processes} ({str(error).split('. GPU')[0]}): go on with "
        f"more processes{share}, or begin a run with a smaller batch or crop, or with training.virtual_ranks, which "
        "take their parts of the batch one after the other."
    )
    found.__cause__ = error
    return found


def _restart() -> int:
    """How often torchrun has started the ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _record_failure(attempt: Path, error: Exception) -> None:
    """Leave the traceback where the launcher finds it: which rank failed first is told by the time.

    By that of the clock which all processes share and nobody sets: the other may jump.
    """
    rank = int(os.environ.get("RANK", "0"))
    restart = _restart()
    failure = {
        "rank": rank,
        "restart": restart,
        "monotonic": time.monotonic(),
        "explained": isinstance(error, CodecmillError),
        "exit_code": getattr(error, "exit_code", 1),
        "may_pass": getattr(error, "may_pass", False),
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    try:
        write_json(attempt / f"failure_{restart}_rank_{rank}.json", failure)
    except (CodecmillError, OSError):  # a full disk, perhaps; in one write, so that no other rank's line gets into it
        short = failure | {"message": str(error)[:1000], "traceback": failure["traceback"][-1000:]}
        os.write(sys.stdout.fileno(), SPOKEN + json.dumps(short).encode() + b"\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
