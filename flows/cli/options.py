"""The commands, and what a typed line means; the flags, which derive from RunConfig, are in flags.

argparse does this, with the fields' JSON schema, and not pydantic-settings' CliSettingsSource, which was tried first
(2.16.3): its help shows neither bounds nor that `data.normalization` takes names (it offers the two flags of the
mapping instead), its errors print 35 lines of usage before one line that suggests nothing, a bare `--training.strict`
is an error, and importing it takes longer than all the rest of `--help`.
"""

import argparse
import errno
import reprlib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NoReturn

from flows.cli.choices import choices
from flows.cli.config_file import Values, checked, combined, nearest, read_config_file
from flows.cli.flags import (
    SPEAK_JSON,
    TAKE_CHECKPOINT,
    TAKE_FILE,
    TAKE_FILES,
    TAKE_RUN,
    USE_STORE,
    add_flags,
    formatter,
    offered,
    width,
)
from pipelines.config import RunConfig
from pipelines.config.dotted import nested
from pipelines.errors import CodecmillError, InputError

COMMANDS = {
    "run": "images to shards to a trained model to a report and a registered version",
    "shards": "only the first stage: images to a shard set",
    "train": "up to the trained model, without evaluation",
    "rendezvous": "be the place where the hosts of a training meet, until Ctrl-C",
    "evaluate": "evaluate and register the model of a run, or try it on other images",
    "resume": "go on with a run where it stopped",
    "sync": "send the store, if there is one, and MLflow what they did not get of a run while they were away",
    "status": "what of a run is done, what is missing, and what to type next",
    "list": "all runs under a root",
    "explain": "what made a checkpoint: data, choices, code, parent, each with its sha256",
    "verify": "read all that a checkpoint comes from, and name every file that has changed",
    "audit": "prove from what is on disk that each step of a run read its samples, once an epoch",
    "reproduce": "train a checkpoint again from what it was made of, and compare the bytes",
    "doctor": "look at machine, root and servers, and say what to do before a run",
    "clean": "remove shard sets that no run names, old copies of images, and old finished runs if asked to",
    "config": "print the complete effective config as YAML, ready to edit",
    "ui": "MLflow's and Prefect's pages over the local state, until Ctrl-C",
    "demo": "the whole pipeline on a few photographs that come with the installation",
    "export": "write a run's weights as one file",
    "compress": "images to coded files, with a trained codec",
    "decompress": "coded files to PNG images, with the codec that wrote them",
}
_EPILOG = """\
Start with `codecmill demo`, or with your own images:
  codecmill run --name first --data.images photos/ --training.steps 2000
  codecmill status first
`codecmill COMMAND --help` lists a command's flags with their bounds.

Exit codes: 0 done, 1 failed, 2 something given cannot be used, 3 run is busy,
129 terminal lost, 130 Ctrl-C, 143 SIGTERM. Servers that MLFLOW_TRACKING_URI or
PREFECT_API_URL name are used, else those of services.env under --root, which
`make services` writes; without it everything lies under --root."""


@dataclass(frozen=True)
class Arguments:
    """What was typed.

    Attributes:
        what: a checkpoint's folder, a run's name or an address in MLflow; `sources`: read its source images, too.
        files: to compress or decompress; `model`: a codec, as `what`, with `quality` 1 to 100 or bits per pixel.
        address: where hosts meet.
        allow_inexact: resume with what changes the bits.
        store: an address in object storage, in place of the environment's.
        older_than: in days, what is to be cleaned; `runs`: runs, too; `dry_run`: only say what.
        file_values: what the config file says; it is read once, as a pipe can be.
        overrides: the config's flags that were given, and only those, nested as in the YAML file.
    """

    command: str
    root: Path
    run: str = ""
    what: str = ""
    address: str = ""
    config_file: Path | None = None
    output: Path | None = None
    files: Sequence[Path] = ()
    model: str | None = None
    quality: float | None = None
    target_bpp: float | None = None
    json: bool = False
    sources: bool = False
    allow_inexact: bool = False
    store: str | None = None
    older_than: float = 0.0
    runs: bool = False
    dry_run: bool = False
    debug: bool = False
    file_values: Values = field(default_factory=dict)
    overrides: Values = field(default_factory=dict)

    def config(self) -> RunConfig:
        """The config of the file, or the defaults, with the flags over it.

        Raises:
            InputError: a value cannot be used.
        """
        return checked(combined(self.file_values, self.overrides), self.config_file, self.overrides)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, for `main` to print."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def parse(typed: Sequence[str]) -> Arguments:
    """What a command line means.

    Raises:
        InputError: it cannot be understood; the message suggests what may have been meant. Or the config file cannot
            be read.
        SystemExit: help was asked for and printed.
    """
    if typed and not typed[0].startswith("-") and typed[0] not in COMMANDS:
        raise InputError(
            f"There is no command '{typed[0]}'.{nearest(typed[0], COMMANDS)} There are: {', '.join(COMMANDS)}."
        )
    if typed and typed[0].startswith("-") and typed[0] not in ("-h", "--help"):
        raise InputError(f"Flags follow the command, as in: codecmill list {typed[0]}. See codecmill --help.")
    found, unknown = _parser(set(typed)).parse_known_args(typed)
    if unknown:
        raise InputError(_about_unknown(found.command, unknown))
    given = vars(found)
    overrides = nested({name: choices()[name].parse(text) for name, text in given.items() if name in choices()})
    named = {key: value for key, value in overrides.items() if key == "root"}
    own = {each.name for each in fields(Arguments)} - {"root"}
    return Arguments(
        root=checked(named, None, named).root,
        file_values=read_config_file(found.config_file) if given.get("config_file") else {},
        overrides=overrides,
        **{name: value for name, value in given.items() if name in own},
    )


def root_of(arguments: Arguments) -> Path:
    """The root, which may stand in a config file only; where that cannot be used, its command will say so."""
    if arguments.config_file is None:
        return arguments.root
    try:
        return arguments.config().root
    except CodecmillError:
        return arguments.root


def check_root(root: Path) -> None:
    """See that a root can be a path.

    Raises:
        InputError: it cannot.
    """
    reason = None
    try:
        str(root).encode()
        root.lstat()
    except UnicodeEncodeError:
        reason = "its name is no UTF-8 text"
    except ValueError:
        reason = "its name has a null character"
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            reason = error.strerror
    if reason is None and "?" in str(root.absolute()):
        reason = "MLflow takes no database below a folder with a question mark in its name"
    if reason:
        raise InputError(f"The root {reprlib.repr(str(root))} cannot be used: {reason}. Name another with --root.")


def _about_unknown(command: str, unknown: list[str]) -> str:
    flag = next((each for each in unknown if each.startswith("-")), None)
    if flag is None:
        return f"codecmill {command} does not know what to do with '{unknown[0]}'. See codecmill {command} --help."
    name = flag.partition("=")[0].lstrip("-")
    others = {
        "json": SPEAK_JSON,
        "config": TAKE_FILE,
        "output": {"export", *TAKE_FILES},
        "model": set(TAKE_FILES),
        "quality": {"compress"},
        "target-bpp": {"compress"},
        "format": {"export"},
        "sources": {"verify"},
        "allow-inexact": {"resume"},
        "store": USE_STORE,
        "older-than": {"clean"},
        "runs": {"clean"},
        "dry-run": {"clean"},
    }
    known = [*offered(command), *(other for other, having in others.items() if command in having), "debug", "help"]
    hint = nearest(name.removeprefix("no-"), known).replace("mean ", "mean --").replace(" or ", " or --")
    return f"codecmill {command} has no flag {flag.partition('=')[0]}.{hint} See codecmill {command} --help."


def _parser(typed: set[str]) -> argparse.ArgumentParser:
    """The parser; only the command that was typed gets its flags, as deriving them for all would take longer."""
    parser = _Parser(
        prog="codecmill",
        usage="codecmill COMMAND [flags]",
        description=_overview(),
        epilog=_EPILOG,
        formatter_class=formatter(16),
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for name, about in COMMANDS.items():
        positional = " RUN" if name in TAKE_RUN else " CHECKPOINT" if name in TAKE_CHECKPOINT else ""
        positional = f" {TAKE_FILES[name]}..." if name in TAKE_FILES else positional
        positional = " HOST:PORT" if name == "rendezvous" else positional
        command = commands.add_parser(
            name,
            prog=f"codecmill {name}",
            usage=f"codecmill {name}{positional} [flags]",
            description=f"{about[0].upper()}{about[1:]}.",
            formatter_class=formatter(40),
            allow_abbrev=False,
        )
        if name in typed:
            add_flags(command, name)
    return parser


def _overview() -> str:
    lines = ["From a folder of images to a trained, evaluated, registered neural image codec.", "", "commands:"]
    for name, about in COMMANDS.items():
        wrapped = textwrap.wrap(about, width() - 14)
        lines += [f"  {name:12}{wrapped[0]}", *(f"{'':14}{line}" for line in wrapped[1:])]
    return "\n".join(lines)
