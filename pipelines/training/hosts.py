"""A training on several hosts: one leads and does all that a run is; others lend it their ranks, and come and go.

Each host runs the same command and torchrun's agent (see membership). The run's folder, which all of them share, says
who leads: whoever holds its locks. Which ranks there are is torchrun's business, and each time that it changes they
begin anew from the latest checkpoint. Here is decided what follows when a host's agent has ended.
"""

import time
from pathlib import Path

from pipelines import checkpoints
from pipelines.errors import Interrupted, RankFailure
from pipelines.locks import owner
from pipelines.run_directory import RunDirectory
from pipelines.training import rendezvous
from pipelines.training.attempts import Trainer
from pipelines.training.following import LOST, STOPPED, Ending, Listen, explanation, failure

MEET_SECONDS = 600.0
"""How long a host waits for the rendezvous, at the start and where it was lost."""

MOST_FRUITLESS = 3
"""Attempts in a row that end with failed ranks and no new checkpoint, after which they will go on failing."""

LOOK_SECONDS = 1.0


class Rounds:
    """Attempts of a host, one after the other, for as long as the training may go on."""

    def __init__(self, trainer: Trainer, meeting: rendezvous.Rendezvous):
        self._trainer = trainer
        self._meeting = meeting
        self._fruitless = 0
        self._newest = self._newest_step()

    def run(self) -> tuple[Path, Ending]:
        """Attempt it until it is done, is to be stopped, or fails for good; returns the last attempt's folder and end.

        Raises:
            RankFailure: the rendezvous does not answer.
        """
        self._meet()
        while True:
            folder, ending = self._trainer.attempt()
            if self.is_finished() or (folder / STOPPED).exists() or not self._goes_on(folder, ending):
                return folder, ending

    def is_finished(self) -> bool:
        """Whether the last step has a checkpoint."""
        last = self._trainer.config.training.steps
        if self._newest_step() < last:
            return False
        found = checkpoints.latest(self._trainer.directory)
        return found is not None and found.step >= last

    def _newest_step(self) -> int:
        return max(checkpoints.steps_on_disk(self._trainer.directory), default=0)

    def _goes_on(self, folder: Path, ending: Ending) -> bool:
        if ending.code == 0:
            self._trainer.on_line("Another host has left, and its ranks have saved; those that are here go on")
            return True
        if ending.code == LOST:
            return self._meet() and not self.is_finished()
        explained = explanation(folder, ending)
        if explained is not None and not explained.may_pass:
            return False  # it would come to that again
        newest = self._newest_step()
        self._fruitless = self._fruitless + 1 if newest <= self._newest else 1
        self._newest = newest
        if self._fruitless == MOST_FRUITLESS:
            return False
        self._trainer.on_line("The ranks of this host have failed, with those of another perhaps; they begin anew")
        return True

    def _meet(self) -> bool:
        """Wait for the rendezvous; False where the others finish meanwhile, or nobody is left to be helped."""
        deadline = time.monotonic() + MEET_SECONDS
        while not self._meeting.answers():
            if self.is_finished() or (self._trainer.lock is None and not is_led(self._trainer.directory)):
                return False
            if time.monotonic() > deadline:
                raise RankFailure(
                    f"The rendezvous at {self._meeting} does not answer. Bring it back, or the way to it, and go on "
                    f"with: {self._trainer.directory.command('resume')}"
                )
            time.sleep(LOOK_SECONDS)
        return True


def help_along(directory: RunDirectory, on_line: Listen) -> None:
    """Lend this host to a run for as long as another one leads it.

    Raises:
        InputError: `CODECMILL_RENDEZVOUS` does not say where the hosts meet, or this one lacks the devices.
        Interrupted: the run was asked to stop.
        CodecmillError: a rank of this host failed; the message is the first failing rank's.
    """
    meeting = rendezvous.named()
    on_line(f"Another process leads '{directory.path.name}'; this one lends it ranks")
    with rendezvous.served(meeting):
        while is_led(directory):
            if owner(directory.training_file):
                _help_once(directory, meeting, on_line)
            time.sleep(LOOK_SECONDS)


def is_led(directory: RunDirectory) -> bool:
    """Whether somebody, on whatever host, does or is about to do what is missing of a run."""
    return any(owner(file) for file in (directory.lead_file, directory.lock_file))


def _help_once(directory: RunDirectory, meeting: rendezvous.Rendezvous, on_line: Listen) -> None:
    config = directory.read_config()
    if config.training.device == "cuda" or config.training.compile is True:
        from pipelines.training.machine import check

        check(config.training)
    rounds = Rounds(Trainer(directory, config, on_line, lock=None, meeting=meeting), meeting)
    if rounds.is_finished():
        return
    folder, ending = rounds.run()
    if rounds.is_finished() or (ending.code == LOST and not is_led(directory)):
        return
    if (folder / STOPPED).exists():
        raise Interrupted(
            f"The training was asked to stop and has saved. Go on with: {directory.command('resume')}",
            exit_code=143,
        )
    raise failure(folder, ending)
