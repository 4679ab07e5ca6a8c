"""The commands by their names: those that look, compare and convert are here, those that run flows in working."""

import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flows.cli import listing, starting, working
from flows.cli.config_file import as_yaml
from flows.cli.options import Arguments
from pipelines import status
from pipelines.errors import CodecmillError
from pipelines.run_directory import Root
from pipelines.storage.address import STORE, checked_url
from tasks.dead_runs import put_right_beside

if TYPE_CHECKING:
    from pipelines.provenance.locating import Found


def perform(arguments: Arguments) -> None:
    """Carry out a command; see flows.cli.endings for how what it raises is told."""
    if arguments.store is not None:
        os.environ[STORE] = checked_url(arguments.store, "--store")
    if arguments.command not in ("doctor", "rendezvous"):  # which change nothing under the root
        put_right_beside(Root(arguments.root))
    {
        "run": working.run,
        "shards": working.shards,
        "train": working.run,
        "evaluate": working.evaluate,
        "resume": working.resume,
        "status": _status,
        "list": _list,
        "doctor": _doctor,
        "clean": _clean,
        "config": _config,
        "ui": _ui,
        "rendezvous": _rendezvous,
        "demo": working.demo,
        "sync": _sync,
        "audit": _audit,
        "export": _export,
        "explain": _explain,
        "verify": _verify,
        "reproduce": _reproduce,
        "compress": _compress,
        "decompress": _decompress,
    }[arguments.command](arguments)


def _list(arguments: Arguments) -> None:
    runs = status.all_runs(Root(arguments.root))
    if arguments.json:
        listing.print_json(runs)
    else:
        listing.print_list(runs, arguments.root)


def _status(arguments: Arguments) -> None:
    found = status.run_status(Root(arguments.root).existing_run(arguments.run))
    if arguments.json:
        listing.print_json(found)
    else:
        listing.print_status(found)


def _doctor(arguments: Arguments) -> None:
    from flows.cli.examining import print_findings
    from pipelines.doctor import examine

    if arguments.json:
        findings = list(examine(Root(arguments.root)))
        listing.print_json(findings)
    else:
        findings = print_findings(examine(Root(arguments.root)))
    faults = sum(finding.state == "fault" for finding in findings)
    if faults:
        raise CodecmillError(f"{faults} of {len(findings)} things that were looked at would have runs fail.")


def _clean(arguments: Arguments) -> None:
    from flows.cli.cleaning import print_cleaned
    from pipelines.cleaning import find_removable, remove

    found = find_removable(Root(arguments.root), arguments.older_than, arguments.runs)
    gone = [each for each in found if arguments.dry_run or remove(each)]
    if arguments.json:
        listing.print_json(gone)
    else:
        print_cleaned(gone, found, arguments.dry_run)


def _config(arguments: Arguments) -> None:
    print(as_yaml(arguments.config()), end="")


def _ui(arguments: Arguments) -> None:
    from flows.cli.ui import serve_pages

    serve_pages(Root(arguments.root.absolute()))


def _rendezvous(arguments: Arguments) -> None:
    from pipelines.training.rendezvous import VARIABLE, parse, serve

    meeting = parse(arguments.address)
    said = f"Hosts can meet at {meeting}, until Ctrl-C. On each of them: export {VARIABLE}={meeting}"
    serve(meeting, ready=lambda: print(said, flush=True))


def _sync(arguments: Arguments) -> None:
    from flows.cli.syncing import sync

    sync(Root(arguments.root).existing_run(arguments.run))


def _audit(arguments: Arguments) -> None:
    run = Root(arguments.root).existing_run(arguments.run)
    from flows.cli.display import shown_progress
    from flows.cli.provenance import print_audit
    from pipelines.provenance.audit import audit

    with shown_progress():
        found = audit(run)
    if arguments.json:
        listing.print_json(found)
    else:
        print_audit(found)
    if found.faults:
        raise CodecmillError(f"The audit of '{arguments.run}' found {len(found.faults)} faults.")


def _export(arguments: Arguments) -> None:
    run = Root(arguments.root).existing_run(arguments.run)
    from pipelines.checkpoints import best
    from pipelines.weights import export_classic

    checkpoint = best(run)
    if checkpoint is None:
        raise CodecmillError(f"Run '{arguments.run}' has no checkpoint yet. Train it: {run.command('resume')}")
    file = arguments.output or Path(f"{arguments.run}-step_{checkpoint.step}.pt")
    export_classic(checkpoint, file)
    best_known = checkpoint.manifest.best
    is_best = best_known is not None and best_known.step == checkpoint.step
    why = "its best in validation" if is_best else "its newest, as no validated one can be used"
    print(f"Wrote step {checkpoint.step} of '{arguments.run}', {why}, to {file}")


def _compress(arguments: Arguments) -> None:
    from flows.cli.display import shown_progress
    from pipelines.codec.files import compress
    from pipelines.codec.opening import open_codec

    output = arguments.output or Path()
    with shown_progress():
        codec = open_codec(arguments.model, Root(arguments.root))
        written = list(compress(arguments.files, output, codec, arguments.quality, arguments.target_bpp))
    listing.tell_written(written, arguments.json)


def _decompress(arguments: Arguments) -> None:
    from flows.cli.display import shown_progress
    from pipelines.codec.files import decompress
    from pipelines.codec.opening import open_codec

    root = Root(arguments.root)
    with shown_progress():
        codec = open_codec(arguments.model, root) if arguments.model else None
        written = list(decompress(arguments.files, arguments.output or Path(), codec, root))
    listing.tell_written(written, arguments.json)


def _explain(arguments: Arguments) -> None:
    from flows.cli.provenance import SHOWN_SOURCES, print_explanation
    from pipelines.provenance.explaining import explain

    with _found(arguments, every=False) as found:
        explanation = explain(found, None if arguments.json else SHOWN_SOURCES)
    if arguments.json:
        listing.print_json(explanation)
    else:
        print_explanation(explanation, shlex.quote(arguments.what) + Root(arguments.root).flag())


def _verify(arguments: Arguments) -> None:
    from flows.cli.display import shown_progress
    from flows.cli.provenance import print_verification
    from pipelines.provenance.verifying import verify

    with _found(arguments, every=True) as found, shown_progress():
        result = verify(found, arguments.sources)
    if arguments.json:
        listing.print_json(result)
    else:
        print_verification(result)
    if result.problems:
        count = "1 problem" if len(result.problems) == 1 else f"{len(result.problems)} problems"
        raise CodecmillError(f"{count} in what '{arguments.what}' comes from.")


def _reproduce(arguments: Arguments) -> None:
    from flows.cli.display import shown_progress, tell
    from flows.cli.provenance import print_reproduction
    from pipelines.provenance.reproducing import reproduce

    with _found(arguments, every=False) as found, starting.going_on_by_repeating(), shown_progress():
        result = reproduce(found, on_line=tell)
    if arguments.json:
        listing.print_json(result)
    else:
        print_reproduction(result)
    if result.differing:
        files = ", ".join(result.differing)
        raise CodecmillError(f"{result.checkpoint} was not reproduced: {files} came out otherwise.")


@contextmanager
def _found(arguments: Arguments, every: bool) -> "Iterator[Found]":
    """The checkpoints that are meant; what only MLflow has is there for the duration."""
    from pipelines.provenance.locating import find

    with tempfile.TemporaryDirectory(prefix="codecmill-") as scratch:
        yield find(arguments.what, Root(arguments.root.absolute()), Path(scratch), every)
