"""The commands and their flags, derived from RunConfig.

argparse does this, with the fields' JSON schema, and not pydantic-settings' CliSettingsSource, which was tried first
(2.16.3): its help shows neither bounds nor that `data.normalization` takes names (it offers the two flags of the
mapping instead), its errors print 35 lines of usage before one line that suggests nothing, a bare `--training.strict`
is an error, and importing it takes longer than all the rest of `--help`.
"""

import argparse
import math
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from flows.cli.choices import Choice, choices, sections
from flows.cli.config_file import Values, nearest
from pipelines.config import RunConfig
from pipelines.errors import InputError

COMMANDS = {
    "run": "images to shards to a trained model to a report and a registered version",
    "shards": "only the first stage: images to a shard set",
    "train": "up to the trained model, without evaluation",
    "evaluate": "evaluate and register the model of a run, or try it on other images",
    "resume": "go on with a run where it stopped",
    "sync": "send MLflow what it did not get of a run while it was away",
    "status": "what of a run is done, what is missing, and what to type next",
    "list": "all runs under a root",
    "explain": "what made a checkpoint: data, choices, code, parent, each with its sha256",
    "verify": "read all that a checkpoint comes from, and name every file that has changed",
    "audit": "prove from what is on disk that each step of a run read its samples, once an epoch",
    "reproduce": "train a checkpoint again from what it was made of, and compare the bytes",
    "doctor": "look at machine, root and servers, and say what to do before a run",
    "clean": "remove shard sets that no run names, and old finished runs if asked to",
    "config": "print the complete effective config as YAML, ready to edit",
    "ui": "MLflow's and Prefect's pages over the local state, until Ctrl-C",
    "demo": "the whole pipeline on a few photographs that come with the installation",
    "export": "write a run's weights as one file",
    "compress": "images to coded files, with a trained codec",
    "decompress": "coded files to PNG images, with the codec that wrote them",
}
_HAVE_CONFIG = {"run", "shards", "train", "evaluate", "resume", "config", "demo"}
_TAKE_RUN = {"evaluate", "resume", "status", "sync", "audit", "export"}
_TAKE_CHECKPOINT = {"explain", "verify", "reproduce"}
_TAKE_FILES = {"compress": "IMAGE", "decompress": "FILE"}
_SPEAK_JSON = {
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
    *_TAKE_CHECKPOINT,
    *_TAKE_FILES,
}
_TAKE_FILE = {"run", "shards", "train", "config"}

_EPILOG = """\
Start with `codecmill demo`, or with your own images:
  codecmill run --name first --data.images photos/ --training.steps 2000
  codecmill status first
`codecmill COMMAND --help` lists a command's flags with their bounds.

Exit codes: 0 done, 1 failed, 2 something given cannot be used, 3 run is busy,
130 Ctrl-C, 143 SIGTERM. Servers that MLFLOW_TRACKING_URI or PREFECT_API_URL
name are used; without them everything lies under --root."""


@dataclass(frozen=True)
class Arguments:
    """What was typed.

    Attributes:
        what: a checkpoint's folder, a run's name or an address in MLflow; `sources`: read its source images, too.
        files: to compress or decompress; `model`: a codec, as `what`, with `quality` 1 to 100 or bits per pixel.
        allow_inexact: resume with what changes the bits.
        older_than: in days, what is to be cleaned; `runs`: runs, too; `dry_run`: only say what.
        overrides: the config's flags that were given, and only those, nested as in the YAML file.
    """

    command: str
    root: Path
    run: str
    what: str
    config_file: Path | None
    output: Path | None
    files: tuple[Path, ...]
    model: str | None
    quality: float | None
    target_bpp: float | None
    json: bool
    sources: bool
    allow_inexact: bool
    older_than: float
    runs: bool
    dry_run: bool
    debug: bool
    overrides: Values


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, for `main` to print."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def parse(typed: Sequence[str]) -> Arguments:
    """What a command line means.

    Raises:
        InputError: it cannot be understood; the message suggests what may have been meant.
        SystemExit: help was asked for and printed.
    """
    if typed and not typed[0].startswith("-") and typed[0] not in COMMANDS:
        raise InputError(
            f"There is no command '{typed[0]}'.{nearest(typed[0], COMMANDS)} There are: {', '.join(COMMANDS)}."
        )
    found, unknown = _parser(set(typed)).parse_known_args(typed)
    if unknown:
        raise InputError(_about_unknown(found.command, unknown))
    given = vars(found)
    overrides = nested({name: choices()[name].parse(text) for name, text in given.items() if name in choices()})
    root = overrides.get("root", given.get("root_folder", RunConfig().root))
    return Arguments(
        command=found.command,
        root=Path(root),
        run=given.get("run", ""),
        what=given.get("what", ""),
        config_file=given.get("config"),
        output=given.get("output"),
        files=tuple(given.get("files", ())),
        model=given.get("model"),
        quality=given.get("quality"),
        target_bpp=given.get("target_bpp"),
        json=given.get("json", False),
        sources=given.get("sources", False),
        allow_inexact=given.get("allow_inexact", False),
        older_than=given.get("older_than", 0.0),
        runs=given.get("runs", False),
        dry_run=given.get("dry_run", False),
        debug=given.get("debug", False),
        overrides=overrides,
    )


def nested(flat: dict[str, Any]) -> Values:
    """Values by dotted name, as sections."""
    values: Values = {}
    for name, value in flat.items():
        section, _, key = name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[key] = value
    return values


def _about_unknown(command: str, unknown: list[str]) -> str:
    flag = next((each for each in unknown if each.startswith("-")), None)
    if flag is None:
        return f"codecmill {command} does not know what to do with '{unknown[0]}'. See codecmill {command} --help."
    name = flag.partition("=")[0].lstrip("-")
    others = {
        "json": _SPEAK_JSON,
        "config": _TAKE_FILE,
        "output": {"export", *_TAKE_FILES},
        "model": set(_TAKE_FILES),
        "quality": {"compress"},
        "target-bpp": {"compress"},
        "format": {"export"},
        "sources": {"verify"},
        "allow-inexact": {"resume"},
        "older-than": {"clean"},
        "runs": {"clean"},
        "dry-run": {"clean"},
    }
    known = [*_offered(command), *(other for other, having in others.items() if command in having), "debug", "help"]
    hint = nearest(name.removeprefix("no-"), known).replace("mean ", "mean --").replace(" or ", " or --")
    return f"codecmill {command} has no flag {flag.partition('=')[0]}.{hint} See codecmill {command} --help."


def _offered(command: str) -> dict[str, Choice]:
    """The config's fields that are flags of a command: those that can make a difference to it."""
    if command == "evaluate":
        return {name: choice for name, choice in choices().items() if choice.section == "evaluation" or name == "root"}
    if command not in _HAVE_CONFIG:
        return {"root": choices()["root"]}
    settled = ("name", "seed") if command in _TAKE_RUN else ()
    return {name: choice for name, choice in choices().items() if name not in settled}


def _parser(typed: set[str]) -> argparse.ArgumentParser:
    """The parser; only the command that was typed gets its flags, as deriving them for all would take longer."""
    parser = _Parser(
        prog="codecmill",
        usage="codecmill COMMAND [flags]",
        description=_overview(),
        epilog=_EPILOG,
        formatter_class=_formatter(16),
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for name, about in COMMANDS.items():
        positional = " RUN" if name in _TAKE_RUN else " CHECKPOINT" if name in _TAKE_CHECKPOINT else ""
        positional = f" {_TAKE_FILES[name]}..." if name in _TAKE_FILES else positional
        command = commands.add_parser(
            name,
            prog=f"codecmill {name}",
            usage=f"codecmill {name}{positional} [flags]",
            description=f"{about[0].upper()}{about[1:]}.",
            formatter_class=_formatter(40),
            allow_abbrev=False,
        )
        if name in typed:
            _add_flags(command, name)
    return parser


def _overview() -> str:
    lines = ["From a folder of images to a trained, evaluated, registered neural image codec.", "", "commands:"]
    for name, about in COMMANDS.items():
        wrapped = textwrap.wrap(about, _width() - 14)
        lines += [f"  {name:12}{wrapped[0]}", *(f"{'':14}{line}" for line in wrapped[1:])]
    return "\n".join(lines)


def _add_flags(command: argparse.ArgumentParser, name: str) -> None:
    if name in _TAKE_RUN:
        command.add_argument("run", metavar="RUN", help="the run's name, as `codecmill list` shows it")
    if name in _TAKE_CHECKPOINT:
        forms = "its folder, a run's name (its best one; verify: all), models:/NAME@ALIAS or runs:/..."
        command.add_argument("what", metavar="CHECKPOINT", help=forms)
    if name in _TAKE_FILE:
        command.add_argument(
            "--config", type=Path, metavar="FILE", help="YAML file with any of the choices below; flags go over it"
        )
    if name in _SPEAK_JSON:
        command.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    if name == "resume":
        inexact = "let training.precision, compile and threads change: the bits will not be those of one machine"
        command.add_argument("--allow-inexact", action="store_true", help=inexact)
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
    if name in _TAKE_FILES:
        _add_files(command, name)
    command.add_argument("--debug", action="store_true", help="show the traceback of an unexpected error")
    if name in _HAVE_CONFIG:
        _add_choices(command, _offered(name))
    else:
        wanted: dict[str, Any] = {"dest": "root_folder", "default": argparse.SUPPRESS, "metavar": "PATH"}
        command.add_argument("--root", type=Path, help=_help(choices()["root"]), **wanted)


def _add_files(command: argparse.ArgumentParser, name: str) -> None:
    kind = _TAKE_FILES[name]
    command.add_argument("files", nargs="+", type=Path, metavar=kind, help="files to read")
    command.add_argument("-o", "--output", type=Path, metavar="DIR", required=True, help="folder to write to")
    usual = "the champion, else the newest finished run" if name == "compress" else "the one that wrote the file"
    forms = f"the codec: a run's name, a checkpoint's folder, models:/NAME@ALIAS or runs:/... [{usual}]"
    command.add_argument("--model", metavar="MODEL", help=forms)
    if name == "compress":
        wanted = command.add_mutually_exclusive_group(required=True)
        wanted.add_argument("--quality", type=float, metavar="Q", help="1 (smallest files) to 100, also in between")
        wanted.add_argument("--target-bpp", type=_positive, metavar="B", help="bits per pixel of the whole file")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no positive number")
    return number


def _days(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of days")
    return number


def _add_choices(command: argparse.ArgumentParser, offered: dict[str, Choice]) -> None:
    wanted_sections = {choice.section for choice in offered.values()}
    groups = {
        name: command.add_argument_group(name, about) for name, about in sections().items() if name in wanted_sections
    }
    for choice in offered.values():
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


def _formatter(position: int) -> type[argparse.HelpFormatter]:
    class Formatter(argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, max_help_position=min(position, _width() // 3), width=_width())

    return Formatter


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 120))
