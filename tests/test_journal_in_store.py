"""The journal in a store: sent in pieces, of which a checkpoint costs the last ones, and brought as it was."""

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from object_store import Proxy, the_store

from pipelines.run_directory import Root, RunDirectory
from pipelines.storage import StoreUnavailable, journal_pieces, keys, patience
from pipelines.storage.journal_pieces import JournalSending, bring_journal
from pipelines.training.journal import Journal, read

PIECE = 1000


@pytest.fixture
def run(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setattr(journal_pieces, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(journal_pieces, "_MARK_BYTES", 100)
    run = Root(make(tiny).root).run("tiny")
    run.path.mkdir(parents=True)
    return run


def trained(run: RunDirectory, first: int, last: int, loss: float = 1.0) -> None:
    """Write the lines of some steps, the ones of those that are done again included."""
    with Journal(run.journal, first - 1) as journal:
        for step in range(first, last + 1):
            journal.append(step, {"train/loss": loss / step})


def sent(sending: JournalSending, run: RunDirectory, proxy: Proxy) -> list[str]:
    """Send, and say what was: the keys below the run's, in their order."""
    proxy.requests.clear()
    sending.send(run.path / ".tmp-sent-journal")
    assert not list(run.path.glob(".tmp-*"))
    paths = [path.partition("?")[0] for method, path in proxy.requests if method == "PUT"]
    return [path.partition("/runs/tiny/")[2] for path in paths]


def pieces(first: int, last: int) -> list[str]:
    return [f"journal/{number:08}" for number in range(first, last + 1)]


def brought(folder: Path) -> bytes:
    there = Root(folder).run("tiny")
    bring_journal(there, the_store())
    assert [file.name for file in there.path.iterdir()] == ["metrics.jsonl"]
    return there.journal.read_bytes()


def test_a_checkpoint_costs_the_pieces_that_have_grown(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    sending = JournalSending(run, the_store())
    trained(run, 1, 50)
    former = run.journal.stat().st_size // PIECE
    assert former > 1
    assert sent(sending, run, proxy) == ["metrics.jsonl", *pieces(1, former)]
    assert sent(sending, run, proxy) == []
    assert brought(tmp_path / "there") == run.journal.read_bytes()
    trained(run, 51, 80)
    with run.journal.open("ab") as journal:
        journal.write(b'{"step": 81, "ti')  # half a line, as in the midst of a step
    assert sent(sending, run, proxy) == pieces(former, run.journal.stat().st_size // PIECE)
    whole = run.journal.read_bytes().rpartition(b"\n")[0] + b"\n"
    assert brought(tmp_path / "there") == whole
    assert sent(JournalSending(run, the_store()), run, proxy) == [], "another process, which looks what is there"


def test_a_journal_of_whole_pieces_is_brought_to_its_end(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    sending = JournalSending(run, the_store())
    for whole in (1, 2):
        run.journal.write_bytes((b"x" * (PIECE // 2 - 1) + b"\n") * 2 * whole)
        assert len(sent(sending, run, proxy)) == 1
        assert brought(tmp_path / f"there{whole}") == run.journal.read_bytes()


@pytest.mark.parametrize("same_process", [True, False])
def test_steps_done_again_otherwise_leave_nothing_of_what_followed(
    run: RunDirectory, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, same_process: bool
):
    """Also where the sending ends between two pieces: nobody finds lines of two trainings one after the other."""
    sending = JournalSending(run, the_store())
    trained(run, 1, 100)
    sent(sending, run, proxy)
    trained(run, 31, 75, loss=2.0)
    if not same_process:
        sending = JournalSending(run, the_store())
    proxy.break_("503", "PUT", "journal/00000002")
    monkeypatch.setattr(patience, "USUAL_SECONDS", 0.5)
    with pytest.raises(StoreUnavailable):
        sending.send(run.path / ".tmp-sent-journal")
    losses = [line["train/loss"] * line["step"] for line in lines_of(brought(tmp_path / "between"), tmp_path)]
    assert losses == sorted(losses) and 30 < len(losses) < 75
    proxy.faults.clear()
    last = run.journal.stat().st_size // PIECE
    assert sent(sending, run, proxy) == pieces(2, last)
    assert keys.journal_pieces(the_store(), "tiny") == list(range(1, last + 1))
    assert brought(tmp_path / "there") == run.journal.read_bytes()


def lines_of(content: bytes, folder: Path) -> list[dict[str, Any]]:
    """The whole ones."""
    file = folder / f"lines-{os.urandom(4).hex()}"
    file.write_bytes(content)
    return list(read(file))


def test_one_that_was_sent_whole_is_brought_whole_and_sent_in_pieces(run: RunDirectory, tmp_path: Path, proxy: Proxy):
    trained(run, 1, 50)
    the_store().send(run.journal, keys.of_journal("tiny", 0))
    assert brought(tmp_path / "there") == run.journal.read_bytes()
    last = run.journal.stat().st_size // PIECE
    assert sent(JournalSending(run, the_store()), run, proxy) == ["metrics.jsonl", *pieces(1, last)]
    assert brought(tmp_path / "there") == run.journal.read_bytes()
