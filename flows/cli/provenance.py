"""What made a checkpoint, whether all of it is still as it was, and what was read for it, on a terminal."""

import textwrap
from collections.abc import Iterable
from typing import Any

from rich.text import Text

from flows.cli.listing import output, readable_size
from pipelines.config import RunConfig
from pipelines.config.dotted import flat
from pipelines.provenance.audit import Audit
from pipelines.provenance.explaining import Explanation, ShardSetLines
from pipelines.provenance.reproducing import Reproduction
from pipelines.provenance.verifying import Verification

SHOWN_SOURCES = 5
SHOWN_SHARDS = 10
_INDENT = 14


def print_explanation(about: Explanation, typed: str) -> None:
    """The links of the chain one below the other; `typed` is what follows the command, for the two that go further."""
    _title(f"Step {about.step} of run '{about.run}'" + (f" ({about.how})" if about.how else ""))
    _line("folder", about.checkpoint)
    _line("", f"{about.manifest_sha256}  checkpoint.json, which names all that follows")
    for name, record in sorted(about.files.items()):
        _line("", f"{record.sha256}  {name}  {readable_size(record.bytes)}")
    _line("samples", _consumed(about))
    _line("config", about.config_file or "(as the checkpoint itself says)")
    _line("", _settings(about.config))
    _line("code", f"codecmill {about.versions.get('codecmill', '?')}, {_commit(about)}")
    packages = {name: version for name, version in about.versions.items() if name != "codecmill"}
    _line("packages", ", ".join(f"{name} {version}" for name, version in sorted(packages.items())))
    for leg in about.legs:
        choices = ", ".join(f"training.{name} {value}" for name, value in leg.training.items())
        _line("", f"up to step {leg.until}: {choices}; git commit {leg.git_commit or 'unknown'}")
    _print_parent(about)
    _print_shard_set(about.shard_set)
    print()
    _line("All of it", f"codecmill explain {typed} --json")
    _line("Is it so?", f"codecmill verify {typed} --sources")


def _print_parent(about: Explanation) -> None:
    if about.parent is None:
        _line("parent", "none: trained from initial weights")
        return
    _line("parent", f"{about.parent.sha256}  {about.parent.named or ''}")
    _line("", about.parent.checkpoint or "no checkpoint with these weights is under this root")
    if about.parent.kept:
        _line("", f"kept in {about.parent.kept}")


def _print_shard_set(about: ShardSetLines) -> None:
    print()
    _title(f"Shard set {about.fingerprint}")
    _line("folder", about.path or "not found")
    if about.manifest_sha256:
        _line("", f"{about.manifest_sha256}  manifest.json")
    if about.problem:
        _line("problem", about.problem)
    rows = [
        f"{row.sha256}  {row.tar}  {_count(row.samples, 'sample')}  {readable_size(row.bytes)}" for row in about.shards
    ]
    _rows("shards", rows[:SHOWN_SHARDS], len(rows))
    sources = [f"{row.sha256}  {row.path}  {_count(row.samples, 'sample')} for {row.split}" for row in about.sources]
    _rows("sources", sources, sum(about.source_counts.values()))


def print_verification(result: Verification) -> None:
    """A line for each thing that is wrong and for each that is worth knowing, or what was verified."""
    console = output()
    for problem in result.problems:
        line = f"{problem.file} {problem.how}. {problem.way_out}"
        console.print(Text(_printable(line), "red"), soft_wrap=True)
    for note in result.notes:
        console.print(Text(_printable(f"Note: {note}"), "yellow"), soft_wrap=True)
    read = f"{_count(result.files, 'file')}, {readable_size(result.bytes)}, in {result.seconds:.1f} s"
    what = f"{_count(len(result.checkpoints), 'checkpoint')} and {_count(len(result.shard_sets), 'shard set')}"
    sources = "source images not read (--sources)" if result.sources is None else _count(result.sources, "source image")
    if not result.problems:
        console.print(f"All as it was: {what}, {sources}; {read}.", soft_wrap=True)


def print_reproduction(result: Reproduction) -> None:
    """Whether the same bytes came out, and what runs here that did not run there."""
    console = output()
    for each in result.other_versions:
        console.print(Text(_printable(f"Note: trained with another version: {each}"), "yellow"), soft_wrap=True)
    if result.differing:
        _title(f"Step {result.step} came out otherwise")
        _line("was", f"{result.sha256}  {result.checkpoint}")
        _line("is", f"{result.sha256_again}  {result.again}")
        return
    _title(f"Step {result.step} came out the same, bit for bit")
    _line("weights", result.sha256)


def print_audit(found: Audit) -> None:
    """A line for each fault, or that every step has read what it should."""
    for fault in found.faults:
        output().print(Text(_printable(fault), "red"), soft_wrap=True)
    if not found.faults:
        starts = "start" if found.attempts == 1 else "starts"
        output().print(
            f"Run '{found.run}': each of its {found.steps:,} steps, in {found.attempts} {starts}, read the samples "
            f"that the order gives it. Each of the {found.samples:,} samples was read once in each of "
            f"{found.epochs:,} epochs, and {found.rest:,} of them in the next.",
            soft_wrap=True,
            markup=False,
        )


def _consumed(about: Explanation) -> str:
    samples = about.samples
    if samples.epochs is None:
        return f"{samples.count}: positions {samples.first} to {samples.last} of the sample order"
    epochs = f"{_count(samples.epochs, 'epoch')} of {samples.samples_per_epoch} and {samples.of_next} of the next"
    return f"{samples.count}: positions {samples.first} to {samples.last} of the sample order, that is {epochs}"


def _settings(config: dict[str, Any] | None) -> str:
    """What differs from the defaults, without what only says where the run is."""
    if config is None:
        return "not recorded"
    defaults = flat(RunConfig().model_dump(mode="json"))
    chosen = {name: value for name, value in flat(config).items() if value != defaults.get(name)}
    named = ", ".join(f"{name} {value}" for name, value in sorted(chosen.items()) if name not in ("name", "root"))
    return f"{named}; all else as by default" if named else "all as by default"


def _commit(about: Explanation) -> str:
    if about.git_commit is None:
        return "not from a git checkout" if about.is_sealed else "its commit was not recorded yet"
    return f"git commit {about.git_commit}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _title(text: str) -> None:
    output().print(Text(_printable(text), "bold"), soft_wrap=True)


def _rows(label: str, rows: Iterable[str], total: int) -> None:
    shown = list(rows)
    for number, row in enumerate(shown):
        _line(label if number == 0 else "", row)
    if total > len(shown):
        _line("", f"... and {total - len(shown)} more")


def _line(label: str, value: object) -> None:
    """A label and a value; words are wrapped, a path or a digest never is."""
    lines = textwrap.wrap(
        _printable(str(value)), max(40, output().width - _INDENT), break_long_words=False, break_on_hyphens=False
    )
    for number, line in enumerate(lines or [""]):
        output().print(f"  {label if number == 0 else '':{_INDENT - 2}}{line}", soft_wrap=True, markup=False)


def _printable(text: str) -> str:
    """Without control characters: names in somebody else's files may try to write on the terminal."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
