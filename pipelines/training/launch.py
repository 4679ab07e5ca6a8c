"""Start the ranks under torchrun, follow them, and end them: what a training looks like from outside."""

import signal
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from pipelines import checkpoint_format, checkpoints
from pipelines.config import RunConfig
from pipelines.durable_files import built_folder, write_bytes
from pipelines.errors import Interrupted
from pipelines.locks import lock
from pipelines.run_directory import RunDirectory
from pipelines.storage.lease import lease_of
from pipelines.training import rendezvous
from pipelines.training.attempts import Trainer
from pipelines.training.following import Ending, Listen, failure
from pipelines.training.hosts import Rounds


def train(directory: RunDirectory, held: int, on_line: Listen, until: int | None = None) -> checkpoints.Checkpoint:
    """Train a run to its last step, from wherever it is; returns the last checkpoint.

    Args:
        directory: a run with its config and shard set.
        held: the descriptor of the held run lock; the ranks' agent shares it, so that it outlives a killed caller
            for as long as the ranks do.
        on_line: receives what the ranks print, a line at a time, in this process.
        until: a step at which to stop before the last one.

    Raises:
        Interrupted: the ranks were asked to stop from outside; what they had reached is saved.
        LostLease: another machine has taken the run over.
        CodecmillError: a rank failed; the message is the first failing rank's.
    """
    config = directory.read_config()
    last = config.training.steps if until is None else until
    done = checkpoints.latest(directory)
    if done and done.step >= last:
        return done
    _fetch_start_weights(directory, config, done)
    directory.stop_request.unlink(missing_ok=True)
    if lease := lease_of(directory):
        lease.must_not_be_lost()  # while the shards were made: the wish to stop that it left is gone with the file
    try:
        trainer = Trainer(directory, config, on_line, held, until=until)
        attempt, ending = trainer.attempt() if config.training.nodes == 1 else _with_other_hosts(trainer)
    finally:
        directory.stop_request.unlink(missing_ok=True)
    reached = checkpoints.latest(directory)
    if reached and reached.step >= last:
        return reached
    if ending.code == 0 and reached:
        raise Interrupted(
            f"Training was asked to stop and saved step {reached.step} of {config.training.steps}. "
            f"Go on with: {directory.command('resume')}",
            exit_code=128 + signal.SIGTERM,
        )
    raise failure(attempt, ending)


def _with_other_hosts(trainer: Trainer) -> tuple[Path, Ending]:
    """Lead the training: hosts that run the same command may join from now on."""
    directory, meeting = trainer.directory, rendezvous.named()
    if not directory.meeting_file.is_file():
        write_bytes(directory.meeting_file, uuid4().hex.encode())
    title = f"The training of '{directory.path.name}'"
    with rendezvous.served(meeting), lock(directory.training_file, title, wait=30.0):
        return Rounds(replace(trainer, meeting=meeting), meeting).run()


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
