"""One attempt at training on this host: torchrun's agent is started, followed and ended, with the ranks below it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.process_lifetime import parent_environment, with_our_sources
from pipelines.run_directory import RunDirectory
from pipelines.training.following import ATTEMPT, LEAVE, Ending, Listen, RankOutput, StepProgress
from pipelines.training.heartbeat import Watch
from pipelines.training.rendezvous import LOOPBACK, Rendezvous, interface_of

GRACE_SECONDS = 25.0
"""How long ranks may take to save and end. Prefect kills a cancelled flow 30 s after it asked.

A person who has typed Ctrl-C waits for them as long as `training.hang_timeout`, through a long validation perhaps: a
second Ctrl-C ends at once.
"""


ALONE = ("--rdzv-backend=codecmill-one-host", f"--local-addr={LOOPBACK}")
"""How torchrun's agent is to meet nobody: see one_host."""


@dataclass(frozen=True)
class Trainer:
    """What attempts of this host have in common.

    Attributes:
        config: of the run, as it is when it is trained.
        on_line: receives what the ranks print, a line at a time, in this process.
        lock: the descriptor of the held run lock; the ranks' agent shares it, so that it outlives a killed caller for
            as long as the ranks do. None on a host that helps another's run: when it leaves, others go on.
        meeting: where the hosts of a run on several of them meet.
        until: a step at which to stop before the last one.
    """

    directory: RunDirectory
    config: RunConfig
    on_line: Listen
    lock: int | None
    meeting: Rendezvous | None = None
    until: int | None = None

    def attempt(self) -> tuple[Path, Ending]:
        """Run the ranks to their end, telling how far they are, and killing one that hangs; returns what is left of it.

        Must be called from a thread that lives as long as the training, since the ranks die with the thread that
        started them. Whatever exception arrives here (Ctrl-C, Prefect's cancellation), the ranks save and end first.
        """
        folder = _new_folder(self.directory)
        training = self.config.training
        watch = Watch(folder, training.hang_timeout, compiles=training.compile is True)
        steps = StepProgress(self.directory.journal, self.until or training.steps)
        process = subprocess.Popen(
            _command(self, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(folder, self.meeting),
            start_new_session=True,
            pass_fds=() if self.lock is None else (self.lock,),
        )
        output = RankOutput(process, folder / "output.log", self.on_line)
        patience = GRACE_SECONDS
        try:
            while process.poll() is None:
                steps.report(output.pass_on())
                known = len(watch.found)
                watch.look()
                for sentence in watch.found[known:]:
                    self.on_line(sentence)
                time.sleep(0.2)
        except KeyboardInterrupt:
            patience = max(patience, training.hang_timeout)
            raise
        finally:
            _end(process, folder / LEAVE if self.lock is None else self.directory.stop_request, patience)
            output.close()
        steps.report("")
        restart = watch.restart
        return folder, Ending(process.returncode, watch.found_of(restart), output.spoken, restart)


def _new_folder(directory: RunDirectory) -> Path:
    while True:
        numbers = (folder.name.removeprefix("attempt_") for folder in directory.logs.glob("attempt_*"))
        number = 1 + max((int(each) for each in numbers if each.isdecimal()), default=0)
        folder = directory.logs / f"attempt_{number:02d}"
        with contextlib.suppress(FileExistsError):  # of another host
            folder.mkdir(parents=True)
            return folder


def _command(trainer: Trainer, folder: Path) -> list[str]:
    training = trainer.config.training
    return [
        *(sys.executable, "-m", "pipelines.training.agent"),
        *(_meeting_arguments(trainer, trainer.meeting) if trainer.meeting else ALONE),
        *(f"--nproc-per-node={training.processes}", f"--max-restarts={training.max_restarts}"),
        f"--log-dir={os.devnull}",  # else each attempt leaves a folder of empty folders in /tmp
        *("-m", "pipelines.training.worker", str(trainer.directory.path.absolute()), str(folder.absolute())),
        *([str(trainer.until)] if trainer.until is not None else []),
    ]


def _meeting_arguments(trainer: Trainer, meeting: Rendezvous) -> tuple[str, ...]:
    return (
        f"--nnodes=1:{trainer.config.training.nodes}",
        "--rdzv-backend=codecmill",  # see membership
        f"--rdzv-endpoint={meeting}",
        f"--rdzv-id={trainer.directory.meeting_id()}",
        f"--local-addr={meeting.own_address()}",
    )


def _environment(folder: Path, meeting: Rendezvous | None) -> dict[str, str]:
    """The caller's environment less what would make a rank think that it belongs to another job or flow."""
    foreign = ("PREFECT_", "TORCHELASTIC_", "MASTER_")
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and k not in ranks}
    # torchrun would set it and print a paragraph about it; the ranks set their threads themselves.
    quiet = {"OMP_NUM_THREADS": "1"}
    # Turns of a loop, about a millisecond, in which a thread that waits for the others of its step keeps its core from
    # those that make batches. libgomp's own 300,000 take some twenty; fewer than these cost the step itself. What the
    # caller says of waiting stands.
    yielding = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": "30000"}
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    traffic = _between_hosts(meeting) if meeting else _interface(LOOPBACK)
    ours = deterministic | with_our_sources() | parent_environment() | {ATTEMPT: str(folder.absolute())}
    return quiet | yielding | traffic | kept | ours


def _between_hosts(meeting: Rendezvous) -> dict[str, str]:
    """What torchrun and gloo need to know where there are other hosts; the caller's own choice stands over it."""
    return {
        # Shared with the agents, the store would stay where it was in the first round, on a host that is gone perhaps.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # All hosts have as many ranks: else agents would ask the store for theirs, and wait for one that is gone.
        "TORCH_ELASTIC_WORKER_IDENTICAL": "1",
        # Of each connection that breaks, libtorch would print its own stack.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **_interface(meeting.own_address()),
    }


def _interface(address: str) -> dict[str, str]:
    """Has gloo take the interface of an address: else it takes that of the address which the host's name has."""
    name = interface_of(address)
    return {"GLOO_SOCKET_IFNAME": name} if name else {}


def _end(process: subprocess.Popen[bytes], request: Path, patience: float) -> None:
    """Ask ranks that are there still to save and end; after so many seconds, or when interrupted again, kill them."""
    if process.poll() is not None:
        return
    try:
        request.touch()
        process.wait(patience)
    except subprocess.TimeoutExpired:
        print(f"The ranks did not end within {patience:.0f} s and are killed.", file=sys.stderr)
    finally:
        # The ranks die with their agent: see process_lifetime.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
