"""What of a run goes to the store: choices, shard set, journal, the newest checkpoint and those that it needs,
evaluations, and which version it is registered as; manifests last."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines import checkpoints
from pipelines.checkpoint_format import MANIFEST, Manifest, file_names, read_manifest
from pipelines.durable_files import link_or_copy
from pipelines.errors import CodecmillError
from pipelines.evaluation.contents import RESULT, check_contents, parse_contents, read_contents
from pipelines.file_digests import file_sha256
from pipelines.run_directory import RunDirectory
from pipelines.storage import keys
from pipelines.storage.address import store_url
from pipelines.storage.journal_pieces import JournalSending
from pipelines.storage.lease import lease_of, leased
from pipelines.storage.patience import StoreFailed
from pipelines.storage.sameness import config_in_store, must_be_one
from pipelines.storage.sending_sets import send_shard_set
from pipelines.storage.store import Store, open_store

log = logging.getLogger("codecmill.storage")

_COPY = ".tmp-sent-"


@dataclass(frozen=True)
class _There:
    """What the store had of a run before anything of it was sent from here: how many steps it is to have, and its
    newest checkpoint.
    """

    steps: int
    newest: int


class Sending:
    """Brings a store level with a run; may be called again and again, and sends what is not there yet.

    Only for the holder of the run's lock: what a killed process has left of it is deleted.
    """

    def __init__(self, run: RunDirectory, store: Store):
        for leftover in run.path.glob(f"{_COPY}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        self._run = run
        self._store = store
        self._sent: set[int] = set()
        """Steps of whose checkpoints the store has every file: looked for once in this process, or sent by it."""
        self._is_tidy = False
        """Whether nothing was sent since it was last looked what of the run the store need not keep."""
        self._damaged: set[int] = set()
        """Steps whose checkpoints are not whole here: not looked at again before there is a newer one."""
        self._level: dict[Path, str] = {}
        """The sha256 of files that the store has by now; of an evaluation, that of its `evaluation.json`."""
        self._is_ours = self._has_shard_set = False
        self._journal = JournalSending(run, store)
        self._there: _There | None = None
        """While it may be more than is here."""

    def send(self) -> None:
        """Send what the store has not got. The newest checkpoint goes first, also where it appears meanwhile.

        Raises:
            StoreError: the store does not take it; what is there stays, the rest comes next time.
            BusyError, LostLease: another machine works on the run, or has taken it over.
            InputError: the store has another run of this name.
        """
        self._confirm()
        if not self._is_ours and (there := config_in_store(self._run, self._store)) is not None:
            must_be_one(self._run, self._store, there)
            newest = max(keys.complete_steps(self._store, self._run.path.name), default=-1)
            self._there = _There(there.training.steps, newest)
        self._is_ours = True
        if self._there is not None and self._has_less_than(self._there):
            return
        self._there = None
        self._send_changed(self._run.config_file, self._run.shard_set_file)
        self._send_mlflow_run()
        self._send_checkpoints()
        if not self._has_shard_set:
            self._send_shard_set()
        self._send_evaluations()
        self._send_changed(self._run.promotion_file)

    def _has_less_than(self, there: _There) -> bool:
        """Whether less of the run is here: it was begun, or has gone on, while the store was away."""
        newest = max(checkpoints.steps_on_disk(self._run), default=-1)
        return newest < there.newest or self._run.read_config().training.steps < there.steps

    def _confirm(self) -> None:
        lease = lease_of(self._run)
        if lease is not None:
            lease.confirm()

    def _send_changed(self, *files: Path) -> None:
        """Small files of the run, overwritten where they have changed."""
        for file in (file for file in files if file.is_file()):
            sha256 = file_sha256(file)
            if self._level.get(file) != sha256:
                self._store.send(file, keys.of_run(self._run.path.name, file.name))
                self._level[file] = sha256

    def _send_mlflow_run(self) -> None:
        """Wherever the training goes on, it goes on in that MLflow run."""
        file = self._run.mlflow_file
        if file.is_file():
            copy = self._copy_of(file.name)
            try:
                link_or_copy(file, copy)  # who reports puts another one in its place meanwhile
                self._store.send(copy, keys.of_run(self._run.path.name, file.name))
            finally:
                copy.unlink(missing_ok=True)

    def _copy_of(self, name: str) -> Path:
        """Where something can lie that does not change while it is sent."""
        return self._run.path / f"{_COPY}{name}-{os.getpid()}"

    def _send_checkpoints(self) -> None:
        """The newest, and those that it needs; others in between are passed over where sending takes longer."""
        on_disk = checkpoints.steps_on_disk(self._run)
        newest = self._sent_newest(on_disk[-1]) if on_disk else None
        if newest is None:
            return
        # Also where the newest was sent long ago: the best may have failed after it.
        needed = checkpoints.needed_by(self._run, newest)
        for step in sorted((needed & set(on_disk)) - self._sent - self._damaged):
            if self._send_checkpoint(step) is None:
                self._damaged.add(step)
        self._retain(newest.step, needed)

    def _sent_newest(self, step: int) -> Manifest | None:
        """What the newest checkpoint on disk says, which the store has by now; None where it is not whole."""
        if step not in self._sent:
            self._damaged.clear()
            sent = self._send_checkpoint(step)
            return sent and sent.manifest
        with suppress(CodecmillError):  # the training has deleted it meanwhile
            return read_manifest(checkpoints.folder_of(self._run, step))
        return None

    def _send_checkpoint(self, step: int) -> checkpoints.Checkpoint | None:
        """Send a checkpoint if it is whole on disk, the journal up to it before its manifest."""
        with _held(checkpoints.folder_of(self._run, step), self._copy_of(str(step))) as folder:
            try:
                checkpoint = checkpoints.open_checkpoint(folder)
            except CodecmillError as error:
                log.warning("A checkpoint is not sent to the store: %s", error)
                return None
            name = self._run.path.name
            for file in file_names(checkpoint.manifest):
                sha256 = checkpoint.manifest.files[file].sha256
                self._store.send(folder / file, keys.of_checkpoint(name, step, file), sha256)
            # As it is now: it has the lines of all checkpoints that are on disk, and more lines do no harm.
            self._journal.send(self._copy_of(self._run.journal.name))
            self._confirm()
            self._store.send(folder / MANIFEST, keys.of_checkpoint(name, step, MANIFEST))
            self._sent.add(step)
            self._is_tidy = False
            return checkpoint

    def _retain(self, newest: int, needed: set[int]) -> None:
        """The store keeps of a run what its disk keeps, and nothing of a checkpoint that was sent by half.

        Manifests go first: nobody believes what is left.
        """
        if self._is_tidy:
            return
        name, keep_latest = self._run.path.name, self._run.read_config().training.keep_latest
        there = keys.checkpoint_files(self._store, name)
        whole = sorted(step for step, files in there.items() if MANIFEST in files)
        kept = {*whole[-keep_latest:], newest, *needed}
        for step in sorted(step for step in there.keys() - kept if step < newest):
            for file in sorted(there[step], key=lambda file: file != MANIFEST):
                self._store.remove(keys.of_checkpoint(name, step, file))
        self._is_tidy = True

    def _send_evaluations(self) -> None:
        for result in sorted(self._run.evaluations.glob(f"step_*/{RESULT}")):
            sha256 = file_sha256(result)
            if self._level.get(result) != sha256:
                self._send_evaluation(result.parent, sha256)
                self._level[result] = sha256

    def _send_evaluation(self, folder: Path, sha256: str) -> None:
        """Send an evaluation if it is whole on disk, in the place of an earlier one of the same name, if any.

        Args:
            sha256: of its `evaluation.json`.
        """
        prefix = keys.of_evaluation(self._run.path.name, folder.name, "")
        there = self._store.find(prefix + RESULT)
        if there is not None and there.sha256 == sha256:
            return
        try:
            contents = read_contents(folder)
            check_contents(folder, contents)
        except CodecmillError as error:
            log.warning("An evaluation is not sent to the store: %s", error)
            return
        if there is not None:
            if self._made(prefix) > contents.made:
                return
            self._store.remove(prefix + RESULT)
        for name, record in contents.files.items():
            self._store.send(folder / name, prefix + name, record.sha256)
        self._confirm()
        self._store.send(folder / RESULT, prefix + RESULT, sha256)
        for each in list(self._store.list(prefix)):
            if each.key.removeprefix(prefix) not in {*contents.files, RESULT}:
                self._store.remove(each.key)

    def _made(self, prefix: str) -> float:
        """When the evaluation below a prefix of the store was made; what cannot be read was made before all others."""
        try:
            return parse_contents(self._store.read(prefix + RESULT), self._store.address(prefix + RESULT)).made
        except StoreFailed:
            raise
        except CodecmillError:
            return -1.0

    def _send_shard_set(self) -> None:
        if not self._run.shard_set_file.is_file():
            return
        send_shard_set(self._store, self._run.shard_set(), between=self._send_checkpoints)
        self._has_shard_set = True


def bring_level(run: RunDirectory) -> None:
    """Send what the store that the environment names, if any, lacks of a run. One that fails is told of, and gets it
    later: what was made is here.

    Must be called by the holder of the run's lock.
    """
    url = store_url()
    if url is None:
        return
    try:
        with leased(run) if lease_of(run) is None else nullcontext():
            Sending(run, open_store(url)).send()
    except (CodecmillError, OSError) as error:  # of this disk, where it is full, say
        log.warning("The store gets what it is missing later, or by %s: %s", run.command("sync"), error)


@contextmanager
def _held(folder: Path, other: Path) -> Iterator[Path]:
    """A folder's files under other names, so that they can be read to the end while the training deletes its own."""
    other.mkdir()
    try:
        for file in folder.glob("*"):
            try:
                link_or_copy(file, other / file.name)
            except FileNotFoundError:
                break  # deleted meanwhile; what is opened next says that it is not whole
        yield other
    finally:
        shutil.rmtree(other, ignore_errors=True)
