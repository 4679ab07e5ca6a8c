"""Where the hosts of a training meet: an address in the environment, at which torch's own store listens.

`python -m pipelines.training.rendezvous HOST:PORT` serves it until it is ended.
"""

import fcntl
import ipaddress
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipelines.errors import CodecmillError, InputError
from pipelines.process_lifetime import die_with_parent, parent_environment, with_our_sources

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

VARIABLE = "CODECMILL_RENDEZVOUS"

LOOPBACK = "127.0.0.1"

DEFAULT_PORT = 29400
"""That of torchrun."""

START_SECONDS = 60.0
"""How long the store may take to listen: it imports torch first."""

_SIOCGIFADDR = 0x8915
"""Linux' question for the IPv4 address of a network interface."""


@dataclass(frozen=True)
class Rendezvous:
    """The address at which the hosts of a training meet."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def answers(self, seconds: float = 2.0) -> bool:
        """Whether something listens there."""
        try:
            socket.create_connection((self.host, self.port), timeout=seconds).close()
        except OSError:
            return False
        return True

    def own_address(self) -> str:
        """The address of this machine that others on the way to the rendezvous reach it by.

        Raises:
            InputError: its name is not known, or no route leads there.
        """
        try:
            family, kind, _, _, there = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(there)  # sends nothing: it only chooses the route
                return str(probe.getsockname()[0])
        except OSError as error:
            raise InputError(f"{VARIABLE} is {self}, to which no way leads from here: {error}.") from error

    def is_here(self) -> bool:
        """Whether it is an address of this machine.

        Raises:
            InputError: it is a name that means this machine and, to this machine alone, the loopback interface.
        """
        try:
            with self.bound(port=0) as bound:
                address = ipaddress.ip_address(bound.getsockname()[0])
        except OSError:
            return False
        if address.is_loopback and self.host not in ("localhost", str(address)):
            raise InputError(
                f"{self} is {address} to this machine, where other hosts do not reach it. Name its address in place of "
                f"'{self.host}', on every host."
            )
        return True

    def bound(self, port: int) -> socket.socket:
        """A socket at the address, with a port of one's own choice."""
        family, kind, _, _, here = socket.getaddrinfo(self.host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(here)
        except OSError:
            bound.close()
            raise
        return bound


def parse(text: str) -> Rendezvous:
    """The address that `HOST` or `HOST:PORT` means.

    Raises:
        InputError: it means none.
    """
    try:
        parts = urlsplit(f"//{text}")
        port = parts.port or DEFAULT_PORT
    except ValueError:
        parts, port = urlsplit(""), DEFAULT_PORT
    if not parts.hostname or parts.path or parts.username is not None:
        raise InputError(f"'{text}' is no address to meet at: give HOST:PORT, such as login1:{DEFAULT_PORT}.")
    return Rendezvous(parts.hostname, port)


def named() -> Rendezvous:
    """The address that the environment names.

    Raises:
        InputError: it names none.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        raise InputError(
            f"training.nodes is above 1, but {VARIABLE} does not say where the hosts meet: set it to HOST:PORT on each "
            "of them, or use --training.nodes 1."
        )
    return parse(text)


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address of this machine; None where it is not found."""
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
        if socket.inet_ntoa(answer[20:24]) == address:
            return name
    return None


def store_at(meeting: Rendezvous) -> "TCPStore":
    """Torch's store, listening at an address of this machine and at no other, for as long as it is held.

    Raises:
        InputError: nothing can listen there.
    """
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    try:
        listening = meeting.bound(meeting.port)
        listening.listen(1024)
    except OSError as error:
        raise InputError(f"Nothing can listen at {meeting} on this machine: {error.strerror or error}.") from error
    port = listening.getsockname()[1]
    return TCPStore(meeting.host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


@contextmanager
def served(meeting: Rendezvous) -> Iterator[None]:
    """Have the store run for the duration where it is to run on this machine and does not yet.

    Raises:
        CodecmillError: it does not come up.
    """
    if not meeting.is_here() or meeting.answers():
        yield
        return
    store = subprocess.Popen(
        [sys.executable, "-m", "pipelines.training.rendezvous", str(meeting)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # of two that are started at once on one machine, one finds the port taken
        env=os.environ | with_our_sources() | parent_environment(),
        start_new_session=True,  # Ctrl-C is for the training, which needs it until it has ended
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not meeting.answers():
            if store.poll() is not None or time.monotonic() > deadline:
                raise CodecmillError(f"Nothing could be made to listen at {meeting}: is the port taken?")
            time.sleep(0.1)
        yield
    finally:
        store.kill()
        store.wait()


def serve(meeting: Rendezvous, ready: Callable[[], None] = lambda: None) -> None:
    """Serve the store at its address, and at no other, until this process is ended.

    Args:
        ready: called once hosts can meet there.

    Raises:
        InputError: the address is not this machine's or only this machine reaches it, or its port is taken.
    """
    if not meeting.is_here():
        raise InputError(f"{meeting} is no address of this machine.")
    store = store_at(meeting)
    ready()
    signal.pause()
    del store


if __name__ == "__main__":
    die_with_parent()
    serve(parse(sys.argv[1]))
