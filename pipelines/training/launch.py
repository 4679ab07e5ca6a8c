"""Start the ranks under torchrun, follow them, and end them: what a training looks like from outside."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipelines import checkpoint_format, checkpoints
from pipelines.config import RunConfig
from pipelines.durable_files import built_folder, write_bytes
from pipelines.errors import Interrupted
from pipelines.process_lifetime import parent_environment
from pipelines.run_directory import RunDirectory
from pipelines.training.following import ATTEMPT, Ending, Listen, RankOutput, StepProgress, failure
from pipelines.training.heartbeat import Watch

GRACE_SECONDS = 25.0
"""How long ranks may take to save and end. Prefect kills a cancelled flow 30 s after it asked."""


def train(directory: RunDirectory, lock: int, on_line: Listen, until: int | None = None) -> checkpoints.Checkpoint:
    """Train a run to its last step, from wherever it is; returns the last checkpoint.

    Args:
        directory: a run with its config and shard set.
        lock: the descriptor of the held run lock; the ranks' agent shares it, so that it outlives a killed caller
            for as long as the ranks do.
        on_line: receives what the ranks print, a line at a time, in this process.
        until: a step at which to stop before the last one.

    Raises:
        Interrupted: the ranks were asked to stop from outside; what they had reached is saved.
        CodecmillError: a rank failed; the message is the first failing rank's.
    """
    config = directory.read_config()
    last = config.training.steps if until is None else until
    done = checkpoints.latest(directory)
    if done and done.step >= last:
        return done
    checkpoints.remove_leftovers(directory)
    _fetch_start_weights(directory, config, done)
    attempt = _new_attempt(directory)
    directory.stop_request.unlink(missing_ok=True)
    try:
        ending = _follow(directory, config, attempt, lock, on_line, until)
    finally:
        directory.stop_request.unlink(missing_ok=True)
    reached = checkpoints.latest(directory)
    if reached and reached.step >= last:
        return reached
    if ending.code == 0 and reached:
        raise Interrupted(
            f"Training was asked to stop and saved step {reached.step} of {config.training.steps}. "
            f"Go on with: codecmill resume {directory.path.name}",
            exit_code=128 + signal.SIGTERM,
        )
    raise failure(attempt, ending)


def _fetch_start_weights(directory: RunDirectory, config: RunConfig, done: checkpoints.Checkpoint | None) -> None:
    if config.training.start_from is None or done or directory.start_weights.exists():
        return
    from safetensors.torch import save

    from pipelines.weights import read_weights

    weights = read_weights(config.training.start_from, directory.root)
    # A foreign file may hold tensors that share memory, which safetensors does not store.
    own = {name: tensor.clone().contiguous() for name, tensor in weights.items()}
    with built_folder(directory.start_weights) as building:
        write_bytes(building / checkpoint_format.WEIGHTS, save(own))


def _new_attempt(directory: RunDirectory) -> Path:
    numbers = (folder.name.removeprefix("attempt_") for folder in directory.logs.glob("attempt_*"))
    number = 1 + max((int(each) for each in numbers if each.isdecimal()), default=0)
    attempt = directory.logs / f"attempt_{number:02d}"
    attempt.mkdir(parents=True)
    return attempt


def _command(config: RunConfig, directory: RunDirectory, attempt: Path, until: int | None) -> list[str]:
    training = config.training
    return [
        *(sys.executable, "-m", "pipelines.training.agent"),
        *("--standalone", f"--nproc-per-node={training.processes}", f"--max-restarts={training.max_restarts}"),
        *("-m", "pipelines.training.worker", str(directory.path.absolute()), str(attempt.absolute())),
        *([str(until)] if until is not None else []),
    ]


def _environment(attempt: Path) -> dict[str, str]:
    """The caller's environment less what would make a rank think that it belongs to another job or flow."""
    foreign = ("PREFECT_", "TORCHELASTIC_", "MASTER_")
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and k not in ranks}
    sources = str(Path(__file__).parents[2])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (sources, kept.get("PYTHONPATH"))))
    # torchrun would set it and print a paragraph about it; the ranks set their threads themselves.
    quiet = {"OMP_NUM_THREADS": "1"}
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return quiet | kept | deterministic | parent_environment() | {ATTEMPT: str(attempt.absolute())}


def _follow(
    directory: RunDirectory, config: RunConfig, attempt: Path, lock: int, on_line: Listen, until: int | None
) -> Ending:
    """Run the ranks to their end, telling how far they are, and killing one that hangs.

    Must be called from a thread that lives as long as the training, since the ranks die with the thread that
    started them. Whatever exception arrives here (Ctrl-C, Prefect's cancellation), the ranks save and end first.
    """
    watch = Watch(attempt, config.training.hang_timeout, compiles=config.training.compile is True)
    steps = StepProgress(directory.journal, until or config.training.steps)
    process = subprocess.Popen(
        _command(config, directory, attempt, until),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(attempt),
        start_new_session=True,
        pass_fds=(lock,),
    )
    output = RankOutput(process, attempt / "output.log", on_line)
    try:
        while process.poll() is None:
            steps.report(output.pass_on())
            known = len(watch.found)
            watch.look()
            for sentence in watch.found[known:]:
                on_line(sentence)
            time.sleep(0.2)
    finally:
        _end(process, directory)
        output.close()
    steps.report("")
    return Ending(process.returncode, watch.found, output.spoken)


def _end(process: subprocess.Popen[bytes], directory: RunDirectory) -> None:
    """Ask ranks that are there still to save and end; after the grace time, or when interrupted again, kill them."""
    if process.poll() is not None:
        return
    try:
        directory.stop_request.touch()
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"The ranks did not end within {GRACE_SECONDS:.0f} s and are killed.", file=sys.stderr)
    finally:
        # The ranks die with their agent: see process_lifetime.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
