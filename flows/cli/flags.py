"""Which flags each command has, derived from RunConfig, and the help that says their bounds."""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from flows.cli.choices import Choice, choices, sections

HAVE_CONFIG = {"run", "shards", "train", "evaluate", "resume", "config", "demo"}
TAKE_RUN = {"evaluate", "resume", "status", "sync", "audit", "export"}
TAKE_CHECKPOINT = {"explain", "verify", "reproduce"}
TAKE_FILES = {"compress": "IMAGE", "decompress": "FILE"}
SPEAK_JSON = {
    "run",
    "shards",
    "train",
    "evaluate",
    "resume",
    "status",
    "list",
    "demo",
    "audit",
    "doctor",
    "clean",
    *TAKE_CHECKPOINT,
    *TAKE_FILES,
}
USE_STORE = {"run", "train", "evaluate", "resume", "sync", "demo"}
TAKE_FILE = {"run", "shards", "train", "config"}


def offered(command: str) -> dict[str, Choice]:
    """The config's fields that are flags of a command: those that can make a difference to it."""
    if command == "evaluate":
        return {name: choice for name, choice in choices().items() if choice.section == "evaluation" or name == "root"}
    if command not in HAVE_CONFIG:
        return {"root": choices()["root"]}
    settled = ("name", "seed") if command in TAKE_RUN else ()
    return {name: choice for name, choice in choices().items() if name not in settled}


def add_flags(command: argparse.ArgumentParser, name: str) -> None:
    if name in TAKE_RUN:
        command.add_argument("run", metavar="RUN", help="the run's name, as `codecmill list` shows it")
    if name in TAKE_CHECKPOINT:
        forms = "its folder, a run's name (its best one; verify: all), models:/NAME@ALIAS or runs:/..."
        command.add_argument("what", metavar="CHECKPOINT", help=forms)
    if name == "rendezvous":
        where = "an address of this machine that all hosts reach; the port may be left out: 29400"
        command.add_argument("address", metavar="HOST:PORT", help=where)
    if name in TAKE_FILE:
        values = "YAML file with any of the choices below; flags go over it"
        command.add_argument("--config", dest="config_file", type=Path, metavar="FILE", help=values)
    if name in SPEAK_JSON:
        command.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    if name == "resume":
        inexact = "let training.precision, compile and threads change: the bits will not be those of one machine"
        command.add_argument("--allow-inexact", action="store_true", help=inexact)
    if name in USE_STORE:
        second = "second home of runs and shard sets, s3://bucket/prefix [default: $CODECMILL_STORE]"
        command.add_argument("--store", metavar="URL", help=second)
    if name == "verify":
        command.add_argument("--sources", action="store_true", help="read every source image and mask as well")
    if name == "clean":
        days = "last written into so many days ago, or longer [default 30]"
        command.add_argument("--older-than", type=_days, default=30.0, metavar="DAYS", help=days)
        command.add_argument("--runs", action="store_true", help="finished runs as well, but the champion's")
        command.add_argument("--dry-run", action="store_true", help="only say what would go")
    if name == "export":
        command.add_argument("--format", choices=["torch"], default="torch", help="torch: a file for torch.load")
        command.add_argument("-o", "--output", type=Path, metavar="FILE", help="file to write [RUN-step_N.pt]")
    if name in TAKE_FILES:
        _add_files(command, name)
    command.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    if name in HAVE_CONFIG:
        _add_choices(command, offered(name))
    else:
        command.add_argument("--root", default=argparse.SUPPRESS, metavar="PATH", help=_help(choices()["root"]))


def _add_files(command: argparse.ArgumentParser, name: str) -> None:
    kind = TAKE_FILES[name]
    command.add_argument("files", nargs="+", type=Path, metavar=kind, help="files to read")
    command.add_argument("-o", "--output", type=Path, metavar="DIR", required=True, help="folder to write to")
    usual = "the champion, else the newest finished run" if name == "compress" else "the one that wrote the file"
    forms = f"the codec: a run's name, a checkpoint's folder, models:/NAME@ALIAS or runs:/... [{usual}]"
    command.add_argument("--model", metavar="MODEL", help=forms)
    if name == "compress":
        wanted = command.add_mutually_exclusive_group(required=True)
        wanted.add_argument("--quality", type=_quality, metavar="Q", help="1 (smallest files) to 100, also in between")
        wanted.add_argument("--target-bpp", type=_positive, metavar="B", help="bits per pixel of the whole file")


def _quality(text: str) -> float:
    number = _number(text)
    if not 1 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no quality, 1 to 100")
    return number


def _positive(text: str) -> float:
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return number


def _days(text: str) -> float:
    number = _number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of days")
    return number


def _number(text: str) -> float:
    """The number that a text is; not a number where it is none, which lies within no bounds."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _add_choices(command: argparse.ArgumentParser, wanted_choices: dict[str, Choice]) -> None:
    wanted_sections = {choice.section for choice in wanted_choices.values()}
    groups = {
        name: command.add_argument_group(name, about) for name, about in sections().items() if name in wanted_sections
    }
    for choice in wanted_choices.values():
        group = groups.get(choice.section, command)
        wanted: dict[str, Any] = {"dest": choice.name, "default": argparse.SUPPRESS}
        if choice.is_switch:
            group.add_argument(
                f"--{choice.name}", nargs="?", const="true", help=_help(choice), metavar=choice.placeholder, **wanted
            )
            group.add_argument(
                f"--no-{choice.name}", action="store_const", const="false", help=argparse.SUPPRESS, **wanted
            )
        else:
            group.add_argument(f"--{choice.name}", help=_help(choice), metavar=choice.placeholder, **wanted)


def _help(choice: Choice) -> str:
    """Description, bounds and default. What the placeholder lists already is not said again."""
    has_bounds = {"N", "X", "KIND"} & set(choice.placeholder.replace(",", "|").split("|"))
    bounds = choice.allowed if has_bounds else ""
    default = "none" if choice.default in (None, "") else _text(choice.default)
    return f"{choice.description} [{bounds + '; ' if bounds else ''}default {default}]".replace("%", "%%")


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def formatter(position: int) -> type[argparse.HelpFormatter]:
    class Formatter(argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=min(position, width() // 3), width=width())

    return Formatter


def width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 120))
