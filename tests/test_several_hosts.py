"""Training on several hosts, for real: network namespaces joined by a bridge, cut off and brought back."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make
from processes import PROJECT, wait_for
from pydantic import ValidationError
from trainings import Undisturbed, begin, ranks_alive, result, steps_done

from flows.cli.services import free_port
from flows.cli.working import lead_or_help
from pipelines import checkpoints
from pipelines.config import RunConfig
from pipelines.errors import BusyError, InputError, RankFailure
from pipelines.locks import lock
from pipelines.run_directory import RunDirectory
from pipelines.training import rendezvous
from pipelines.training.distributed import Ranks
from pipelines.training.writing import sole_writer

# What `codecmill train` does once it knows what is missing, less Prefect: leads, or helps whoever does.
HOST = """
import signal, sys
from pathlib import Path
from flows.cli.working import lead_or_help
from flows.cli.services import free_port
from pipelines import checkpoints
from pipelines.run_directory import RunDirectory
from pipelines.training import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have been told to ignore it
run = RunDirectory(Path(sys.argv[1]))
def lead():
    with run.locked(wait=30) as lock:
        launch.train(run, lock, on_line=lambda line: print(line, flush=True))
def is_finished():
    found = checkpoints.latest(run)
    return found is not None and found.step == run.read_config().training.steps
lead_or_help(run, lead, is_finished)
"""

# A slow disk: else so small a training would be over before a host is back.
SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    time.sleep(0.05)
    fsync(descriptor)
os.fsync = slow
"""


def slow_disk(folder: Path) -> Path:
    (folder / "slow").mkdir()
    (folder / "slow" / "sitecustomize.py").write_text(SLOW_DISK)
    return folder / "slow"


def environment(meeting: str, slow: Path | None = None) -> dict[str, str]:
    path = os.pathsep.join(map(str, filter(None, (PROJECT, slow))))
    return os.environ | {rendezvous.VARIABLE: meeting, "PYTHONPATH": path}


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def place_to_meet(meeting: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own for it, that answers: else the first host that comes would serve one itself."""
    command = [sys.executable, "-m", "flows", "rendezvous", meeting]
    with ended(subprocess.Popen(command, cwd=PROJECT, env=environment(meeting))) as process:
        wait_for(rendezvous.parse(meeting).answers)
        yield process


def rounds(directory: RunDirectory, hosts: int) -> list[int]:
    """The steps from which so many hosts have begun, of each host's log one after the other."""
    logs = [file.read_text() for file in sorted(directory.logs.glob("attempt_*/output.log"))]
    found = [re.findall(rf"(?:Resuming|Starting) at step (\d+) on {hosts} of 2 hosts", log) for log in logs]
    return [int(step) for steps in found for step in steps]


def newest(directory: RunDirectory) -> int:
    return max(checkpoints.steps_on_disk(directory), default=0)


class Host:
    """A host of its own as far as its network and its name go."""

    def __init__(self, number: int, stack: ExitStack):
        self.address = f"10.9.0.1{number}"
        self._link = f"veth{number}"
        name = f"host{number}"
        command = ["unshare", "--net", "--uts", "sh", "-c", f"hostname {name} && echo && exec sleep 1000"]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        stack.enter_context(ended(holder))
        assert holder.stdout is not None
        holder.stdout.readline()
        self._enter = ["nsenter", "-t", str(holder.pid), "--net", "--uts"]
        self._network = Path(f"/proc/{holder.pid}/ns/net").readlink()
        self._holder = holder.pid
        ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        ip("link", "set", self._link, "master", "bridge", "up")
        ip("address", "add", f"{self.address}/24", "dev", "eth0", inside=self._enter)
        for device in ("lo", "eth0"):
            ip("link", "set", device, "up", inside=self._enter)

    def start(self, directory: RunDirectory, meeting: str, slow: Path) -> subprocess.Popen[bytes]:
        command = [*self._enter, sys.executable, "-c", HOST, str(directory.path)]
        return subprocess.Popen(command, cwd=PROJECT, env=environment(meeting, slow))

    def cut_off(self) -> None:
        ip("link", "set", self._link, "down")

    def bring_back(self) -> None:
        ip("link", "set", self._link, "up")

    def ranks(self) -> list[int]:
        """Its processes that are ranks."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_mine = (process / "ns/net").readlink() == self._network
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if is_mine and b"pipelines.training.worker" in words and b"pipelines.training.agent" not in words:
                found.append(int(process.name))
        return found


def ip(*words: str, inside: list[str] | None = None) -> None:
    subprocess.run([*(inside or ()), "ip", *words], check=True, timeout=20)


def inside(config: RunConfig, slow: Path) -> dict[str, Any]:
    """Two hosts train; each is cut off in turn, and brought back. Runs in network and process namespaces of its own."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "bridge", "type", "bridge")
    ip("address", "add", "10.9.0.1/24", "dev", "bridge")
    ip("link", "set", "bridge", "up")
    directory, meeting = begin(config), "10.9.0.1:29400"
    seen: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.enter_context(place_to_meet(meeting))
        first, second = Host(1, stack), Host(2, stack)
        leader = stack.enter_context(ended(first.start(directory, meeting, slow)))
        wait_for(directory.training_file.exists, 60)
        helper = stack.enter_context(ended(second.start(directory, meeting, slow)))
        seen["helper"] = lost_and_found(directory, second, first)
        seen["leader"] = lost_and_found(directory, first, second)
        seen["codes"] = [process.wait(120) for process in (leader, helper)]
    return seen | {"alone": rounds(directory, 1), "result": result(directory)}


def lost_and_found(directory: RunDirectory, lost: Host, other: Host) -> dict[str, float]:
    """Cut a host off in the midst of a training on two, until the other has trained some alone, and bring it back."""
    wait_for(lambda: newest(directory) >= max(rounds(directory, 2), default=10**9) + 20, 90)
    assert lost.ranks() and other.ranks()
    alone, together = len(rounds(directory, 1)), len(rounds(directory, 2))
    lost.cut_off()
    cut = time.monotonic()
    wait_for(lambda: not lost.ranks(), 40)
    stopped, saved = time.monotonic() - cut, newest(directory)
    wait_for(lambda: len(rounds(directory, 1)) > alone, 60)
    resumed = time.monotonic() - cut
    wait_for(lambda: newest(directory) >= saved + 20, 60)
    assert saved in rounds(directory, 1), "the last checkpoint before the cut is where the other goes on"
    assert not lost.ranks()
    lost.bring_back()
    back = time.monotonic()
    wait_for(lambda: len(rounds(directory, 2)) > together, 60)
    return {"stopped": stopped, "resumed": resumed, "joined": time.monotonic() - back}


INSIDE = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tests")
import test_several_hosts
from pipelines.config import RunConfig
config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())
print(json.dumps(test_several_hosts.inside(config, Path(sys.argv[2]))))
"""

LONG = {"virtual_ranks": 2, "validation_interval": 100, "steps": 400}

NAMESPACES = ["unshare", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]


def test_a_run_that_some_other_machine_works_on_is_busy_and_not_asked_for_again_and_again(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """As one that holds the run's lease in a store: there is nobody here to lend ranks to."""
    monkeypatch.setenv(rendezvous.VARIABLE, "127.0.0.1")
    run, asked = begin(make(tiny)), 0

    def lead() -> None:
        nonlocal asked
        asked += 1
        raise BusyError("Run 'tiny' is in use by process 7 on another.")

    with pytest.raises(BusyError, match="in use by process 7 on another"):
        lead_or_help(run, lead, is_finished=lambda: asked > 1)
    assert asked == 1


@pytest.mark.full
def test_either_host_may_be_cut_off_and_come_back_and_the_bits_are_the_same(
    tiny: dict[str, Any], tmp_path: Path, undisturbed: Undisturbed
):
    config = make(tiny, name="cut", training=LONG | {"checkpoint_interval": 10, "nodes": 2})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    program = [sys.executable, "-c", INSIDE, str(tmp_path / "config.json"), str(slow_disk(tmp_path))]
    done = subprocess.run([*NAMESPACES, *program], cwd=PROJECT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    print({name: seen[name] for name in ("helper", "leader")})
    for name in ("helper", "leader"):
        assert seen[name]["stopped"] < 30, f"the {name} was cut off"
    assert seen["codes"] == [0, 0]
    assert seen["result"] == undisturbed(make(tiny, training=LONG))


def free_address() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


@contextmanager
def at_work(directory: RunDirectory, meeting: str, slow: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A host that has no network of its own."""
    command = [sys.executable, "-c", HOST, str(directory.path)]
    with ended(subprocess.Popen(command, cwd=PROJECT, env=environment(meeting, slow))) as process:
        yield process


def test_two_hosts_train_the_bits_of_one(tiny: dict[str, Any], undisturbed: Undisturbed):
    """Without a store of its own: the host that is first serves it where the address is its own."""
    two, meeting = begin(make(tiny, name="two", training={"virtual_ranks": 4, "nodes": 2})), free_address()
    with at_work(two, meeting) as leader:
        wait_for(two.training_file.exists)
        with at_work(two, meeting) as helper:
            assert [process.wait(60) for process in (leader, helper)] == [0, 0]
    assert (rounds(two, 2), rounds(two, 1)) == ([0], [])
    assert result(two) == undisturbed(make(tiny, training={"virtual_ranks": 4}))
    recorded = checkpoints.latest(two)
    assert recorded is not None and recorded.manifest.config is not None
    assert recorded.manifest.config["training"]["processes"] == 2, "ranks that there were"


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_helper_leaves_the_place_to_meet_is_lost_and_the_leader_is_killed(
    tiny: dict[str, Any], tmp_path: Path, undisturbed: Undisturbed
):
    training = {"virtual_ranks": 2, "steps": 800}  # with many validations, else it is over too soon
    directory = begin(make(tiny, name="left", training=training | {"checkpoint_interval": 800, "nodes": 2}))
    meeting = free_address()
    slow = slow_disk(tmp_path)
    with place_to_meet(meeting) as store, at_work(directory, meeting, slow) as leader:
        wait_for(directory.training_file.exists)
        with at_work(directory, meeting, slow) as helper:
            wait_for(lambda: bool(rounds(directory, 2)) and steps_done(directory) >= rounds(directory, 2)[-1] + 10)
            alone = len(rounds(directory, 1))  # a first time where the helper was late
            os.kill(helper.pid, signal.SIGINT)
            assert helper.wait(30) != 0
            wait_for(lambda: len(rounds(directory, 1)) > alone)
        left = rounds(directory, 1)[-1]
        assert left > rounds(directory, 2)[-1], "where they were"
        assert left in checkpoints.steps_on_disk(directory), "all ranks have saved"
        with at_work(directory, meeting, slow) as helper:
            wait_for(lambda: len(rounds(directory, 2)) == 2 and steps_done(directory) >= rounds(directory, 2)[-1] + 10)
            store.kill()
            wait_for(lambda: not ranks_alive(directory), 30)
            saved = newest(directory)
            assert saved > rounds(directory, 2)[-1], "all have saved where the place to meet was lost"
            with place_to_meet(meeting):
                wait_for(lambda: len(rounds(directory, 2)) == 3 and steps_done(directory) >= saved + 10)
                alone = len(rounds(directory, 1))
                os.kill(leader.pid, signal.SIGKILL)
                assert helper.wait(240) == 0
    assert saved in rounds(directory, 1) + rounds(directory, 2)
    assert len(rounds(directory, 1)) == alone + 1
    assert result(directory) == undisturbed(make(tiny, training=training))


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("login1", "login1", 29400),
        ("login1:5000", "login1", 5000),
        ("10.0.0.1:1", "10.0.0.1", 1),
        ("[fe80::1]:5000", "fe80::1", 5000),
    ],
)
def test_an_address_to_meet_at(text: str, host: str, port: int):
    assert rendezvous.parse(text) == rendezvous.Rendezvous(host, port)
    assert rendezvous.parse(str(rendezvous.parse(text))) == rendezvous.Rendezvous(host, port)


@pytest.mark.parametrize("text", ["", ":5000", "a:b", "a:70000", "http://a:5000", "a/b", "me@a"])
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(InputError, match=r"is no address to meet at: give HOST:PORT"):
        rendezvous.parse(text)


def test_a_place_to_meet_that_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"192\.0\.2\.1:29400 is no address of this machine"):
        rendezvous.serve(rendezvous.parse("192.0.2.1"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"Nothing can listen at 127\.0\.0\.1:\d+ .*: Address already in use"):
            rendezvous.serve(rendezvous.Rendezvous("127.0.0.1", taken.getsockname()[1]))


def test_a_place_to_meet_says_that_it_is_one_and_how_to_get_there():
    meeting = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "flows", "rendezvous", meeting]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE)
    with ended(process):
        assert process.stdout
        said = process.stdout.readline().decode()
        on_each = f"On each of them: export CODECMILL_RENDEZVOUS={meeting}"
        assert said == f"Hosts can meet at {meeting}, until Ctrl-C. {on_each}\n"
        assert rendezvous.parse(meeting).answers()
    process.stdout.close()


def test_a_name_that_only_this_machine_knows_by_its_loopback_is_refused(monkeypatch: pytest.MonkeyPatch):
    """As Debian's installer has it in /etc/hosts, for the machine's own name."""
    resolved = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolved)
    with pytest.raises(InputError, match=r"node1:29400 is 127\.0\.1\.1 to this machine, .* in place of 'node1'"):
        rendezvous.parse("node1").is_here()


def test_a_host_that_is_not_told_where_to_meet_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(rendezvous.VARIABLE, raising=False)
    with pytest.raises(InputError, match=r"CODECMILL_RENDEZVOUS does not say where the hosts meet"):
        rendezvous.named()


@pytest.mark.parametrize(
    ("training", "text"),
    [
        (
            {"nodes": 256, "processes": 8, "batch_size": 4096},
            "training.processes 8 on training.nodes 256 is more than 1024",
        ),
        ({"nodes": 2, "processes": 3}, r"training.processes 3 on training.nodes 2 is more than training.batch_size 4"),
        ({"nodes": 2, "virtual_ranks": 1}, r"virtual_ranks 1 is no multiple of the 2 ranks .*: take a multiple of 2"),
        ({"nodes": 3, "virtual_ranks": 4}, r"virtual_ranks 4 is no multiple of the 3 ranks .*: take a multiple of 6"),
    ],
)
def test_ranks_that_would_not_come_out_even_are_refused(tiny: dict[str, Any], training: dict[str, Any], text: str):
    with pytest.raises(ValidationError, match=text):
        make(tiny, training=training)


def test_a_first_rank_waits_for_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.training.writing.PATIENCE_SECONDS", 0.2)
    directory = RunDirectory(tmp_path / "held")
    directory.path.mkdir()
    with (
        lock(directory.writer_file, "It", wait=0),
        pytest.raises(BusyError, match=r"The training of 'held' is in use by process \d+"),
        sole_writer(directory, Ranks(0, 1, torch.device("cpu"))),
    ):
        raise AssertionError("two write")


def test_a_writer_whose_lock_was_given_to_another_writes_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As an NFS server gives it, which has not heard from a host for its lease."""
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)  # it is alone
    directory = RunDirectory(tmp_path)
    with sole_writer(directory, Ranks(0, 1, torch.device("cpu"))) as check:
        check()
        directory.writer_file.write_text("12 elsewhere\n")
        with pytest.raises(RankFailure, match=r"another has taken over the run: .*\.writer names process 12 elsewhere"):
            check()
