"""How a command ends: its exit code, one clear message, and what Ctrl-C, SIGTERM and a lost terminal do."""

import errno
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TextIO

from flows.cli.options import Arguments, check_root, parse, root_of
from pipelines.errors import CodecmillError, InputError
from pipelines.process_memory import collect_rarely
from pipelines.run_directory import Root
from pipelines.service_addresses import use_services

_SHOW_CURSOR = b"\x1b[?25h"


class Terminated(BaseException):
    """SIGTERM has come, or SIGHUP, for the terminal is gone. No Exception, so that nobody takes it for a failure."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


def carry_out(typed: Sequence[str]) -> int:
    """Do what a command line says; returns the exit code. Whatever goes wrong is one message on standard error."""
    arguments: Arguments | None = None
    collect_rarely()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we came
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be UTF-8, and shall end no command
    try:
        with _stopping_by_signals():
            arguments = parse(typed)
            root = root_of(arguments)
            check_root(root)
            use_services(Root(root))
            from flows.cli.commands import perform

            perform(arguments)
            sys.stdout.flush()
        return 0
    except CodecmillError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("Interrupted.")
        return 128 + signal.SIGINT
    except Terminated as stop:
        _say("Terminated.")
        return stop.exit_code
    except BrokenPipeError as error:
        if not _is_unread(sys.stdout):  # some other pipe, in the midst of the work
            _say(_unexpected(error, arguments))
            return 1
        silence(sys.stdout)  # the reader (head, less) has seen enough
        return 0
    except Exception as error:  # the last resort: little that we know how to explain
        if isinstance(error, OSError) and error.errno == errno.EIO and _is_unread(sys.stdout):
            silence(sys.stdout)  # the terminal is gone, and SIGHUP on its way
            return 128 + signal.SIGHUP
        closed = closed_place(error, root_of(arguments)) if arguments and not arguments.debug else None
        if closed:
            _say(closed)
            return InputError.exit_code
        _say(_unexpected(error, arguments))
        return 1


def _say(message: str) -> None:
    try:
        print(f"codecmill: {message}", file=sys.stderr, flush=True)
    except OSError:  # a pipe that nobody reads, a terminal that is gone
        silence(sys.stderr)


def _is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more, or a terminal that is gone."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def silence(stream: TextIO) -> None:
    """Write a stream that nobody reads any more to nowhere: Python would fail again, at the latest when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def closed_place(error: Exception, root: Path) -> str | None:
    """A sentence where no more is wrong than that a folder, the root perhaps, does not let us in."""
    if not isinstance(error, OSError) or error.errno not in _CLOSED or not isinstance(error.filename, str | bytes):
        return None
    place, root = Path(os.fsdecode(error.filename)).absolute(), root.absolute()
    way_out = "move away the file in its way" if error.errno == errno.ENOTDIR else "have whoever owns it let you in"
    if place.is_relative_to(root) or root.is_relative_to(place):
        way_out = f"choose another --root, or {way_out}"
    return f"{place} cannot be used: {error.strerror}. {way_out[:1].upper()}{way_out[1:]}."


def _unexpected(error: Exception, arguments: Arguments | None) -> str:
    text = "".join(traceback.format_exception(error))
    first = str(error).strip().partition("\n")[0][:300]
    what = f"{type(error).__name__}: {first}" if first else type(error).__name__
    if arguments is None or arguments.debug:
        return f"Unexpected {what}\n{text}"
    logs = root_of(arguments).absolute() / "logs"
    file = logs / f"error-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}.log"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError:
        return f"Unexpected {what}\n{text}"
    return f"Unexpected {what}. The traceback is in {file}; --debug shows it."


@contextmanager
def _stopping_by_signals() -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP is raised where the work is, so that it can save; a second SIGINT
    or SIGTERM ends at once.

    Children die with this process, see process_lifetime. What the caller ignores, as `nohup` and `&` in a script do,
    stays ignored.
    """
    came: set[int] = set()

    def stop(number: int, _: FrameType | None) -> None:
        if came and number == signal.SIGHUP:
            return  # the shell says so, and then the terminal
        if came:
            os.write(2, (_SHOW_CURSOR if os.isatty(2) else b"") + b"\ncodecmill: Ended at once.\n")
            os._exit(128 + number)
        came.add(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in stopping if signal.getsignal(number) != signal.SIG_IGN]
    former = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
