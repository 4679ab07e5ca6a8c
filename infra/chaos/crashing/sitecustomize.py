"""Put first on PYTHONPATH by `infra.chaos.points`, this makes every process of a run record, or end at, a crash point.

A crash point is a call that changes what is on disk, in MLflow, or between ranks. It is named by who makes it (role),
what it is (kind), from which function of codecmill (place), and how many of these its process has made (number).
Not part of codecmill: no process has it that a campaign has not started.
"""

import builtins
import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

RECORD = os.environ.get("CODECMILL_CRASH_RECORD")
POINT = json.loads(os.environ.get("CODECMILL_CRASH_POINT", "null"))
ROOT = os.environ.get("CODECMILL_CHAOS", "/nowhere")
SOURCES = str(Path(__file__).parents[3])
OURS = tuple(f"{SOURCES}/{storey}/" for storey in ("flows", "tasks", "pipelines"))

TOOLS = ("/durable_files.py", "/locks.py", "/sealed_json.py")

COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_gather_single", "all_to_all_single", "broadcast", "barrier")
LOG_CALLS = ("log_batch", "log_inputs", "log_artifact", "log_artifacts", "set_tag", "set_terminated")
LOG_CALLS += ("create_run", "create_model_version", "set_model_version_tag", "set_registered_model_alias")

_counts: Counter[tuple[str, str]] = Counter()
_busy = threading.local()


def _role() -> str:
    words = " ".join(sys.orig_argv)
    if "pipelines.training.agent" in words:
        return "torchrun"
    if "pipelines.training.worker" in words:
        return f"rank {os.environ.get('RANK', '?')}"
    if "encoding_worker" in words:
        return "shard worker"
    return "command" if "-m flows" in words or "flows/__main__" in words else "service"


def _place() -> str | None:
    """The innermost function of codecmill's own that is not one of its tools for writing files."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS) and not frame.f_code.co_filename.endswith(TOOLS):
            return f"{frame.f_code.co_filename[len(SOURCES) + 1 :]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return None


def _kill_everything() -> None:
    """SIGKILL to all processes of the run, to this one last."""
    wanted = f"CODECMILL_CHAOS={ROOT}".encode()
    for entry in os.listdir("/proc"):  # noqa: PTH208  # nothing here may go through what is wrapped
        if entry.isdecimal() and int(entry) != os.getpid():
            with contextlib.suppress(OSError):
                descriptor = os.open(f"/proc/{entry}/environ", os.O_RDONLY)
                content = os.read(descriptor, 1_000_000)
                os.close(descriptor)
                if wanted in content.split(b"\0"):
                    os.kill(int(entry), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _passed(kind: str, place: str, moment: str, number: int) -> None:
    here = {"role": _role(), "kind": kind, "place": place, "number": number, "moment": moment}
    if RECORD and moment == "before":
        descriptor = os.open(RECORD, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, json.dumps(here).encode() + b"\n")
        os.close(descriptor)
    if here == POINT:
        _kill_everything()


def _wrapped(
    kind: str, call: Callable[..., Any], is_meant: Callable[..., bool] = lambda *a, **k: True
) -> Callable[..., Any]:
    def point(*arguments: Any, **named: Any) -> Any:
        place = None if getattr(_busy, "now", False) else _place()
        if place is None or not is_meant(*arguments, **named):
            return call(*arguments, **named)
        _busy.now = True
        try:
            _counts[kind, place] += 1
            number = _counts[kind, place]
            _passed(kind, place, "before", number)
        finally:
            _busy.now = False
        result = call(*arguments, **named)
        _passed(kind, place, "after", number)
        return result

    return point


def _is_below_root(path: Any, *_: Any, **__: Any) -> bool:
    return isinstance(path, str | os.PathLike) and os.path.abspath(os.fspath(path)).startswith(ROOT)  # noqa: PTH100


def _is_write_below_root(path: Any, mode: Any = "r", *_: Any, **__: Any) -> bool:
    return isinstance(mode, str) and any(letter in mode for letter in "wax+") and _is_below_root(path)


def _wrap_files() -> None:
    os.fsync = _wrapped("fsync", os.fsync)
    for name in ("replace", "rename", "link", "unlink", "mkdir", "rmdir"):
        setattr(os, name, _wrapped(name, getattr(os, name), _is_below_root))
    builtins.open = _wrapped("write", builtins.open, _is_write_below_root)
    import io

    io.open = builtins.open  # Path.open calls this one


LATE = {"torch.distributed": COLLECTIVES, "mlflow.tracking.client": LOG_CALLS}


class _Late(importlib.abc.MetaPathFinder):
    """Wraps what a module has as soon as it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in LATE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def then_wrap(module: ModuleType) -> None:
            execute(module)
            of, kind = (module.MlflowClient, "log call") if "mlflow" in name else (module, "collective")
            for each in LATE[name]:
                if hasattr(of, each):
                    setattr(of, each, _wrapped(kind, getattr(of, each)))

        spec.loader.exec_module = then_wrap  # type: ignore[method-assign]
        return spec


if RECORD or POINT:
    _wrap_files()
    sys.meta_path.insert(0, _Late())
