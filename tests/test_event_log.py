"""The run's log for machines: an object a line with run, stage, rank and step, from every process of a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import make
from trainings import begin, train

from pipelines.event_log import events
from pipelines.progress import Progress, report
from pipelines.run_directory import Root, RunDirectory


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return Root(tmp_path).run("first")


def test_records_progress_and_errors_are_events(run: RunDirectory):
    with pytest.raises(ValueError, match="it broke"), events(run):
        logging.getLogger("codecmill.training").info("Saved %s", "it", extra={"step": 7})
        logging.getLogger("codecmill.checkpoints").warning("Skipping")
        logging.getLogger("other").warning("none of ours")
        report(Progress("training", 3, 10, "steps", values={"loss": 0.5}))
        raise ValueError("it broke")
    found = [(each["level"], each["stage"], each["rank"], each["step"], each["message"]) for each in lines(run)]
    assert found == [
        ("info", "training", None, 7, "Saved it"),
        ("warning", "checkpoints", None, None, "Skipping"),
        ("info", "training", None, 3, "3 of 10 steps"),
        ("error", None, None, None, "ValueError: it broke"),
    ]
    assert lines(run)[2]["values"] == {"loss": 0.5}
    assert {each["run"] for each in lines(run)} == {"first"}
    assert logging.getLogger("codecmill").handlers == []


def test_of_a_stop_that_has_no_text_it_says_what_it_is(run: RunDirectory):
    with pytest.raises(KeyboardInterrupt), events(run):
        raise KeyboardInterrupt
    with pytest.raises(ZeroDivisionError), events(run):
        raise ZeroDivisionError
    assert [each["message"] for each in lines(run)] == [
        "KeyboardInterrupt: stopped from outside",
        "ZeroDivisionError: no more is known",
    ]


def test_of_many_reports_the_first_the_last_and_what_says_something_are_events(run: RunDirectory):
    with events(run):
        for done in range(101):
            report(Progress("shards", done, 100, "images", "a broken one" if done == 50 else ""))
    assert [each["message"] for each in lines(run)] == [
        "0 of 100 images",
        "50 of 100 images  a broken one",
        "100 of 100 images",
    ]


def test_a_rank_reports_no_progress(run: RunDirectory):
    with events(run, rank=1) as log:
        report(Progress("training", 3, 10, "steps"))
        log.write("here")
    assert [(each["rank"], each["message"]) for each in lines(run)] == [(1, "here")]


def test_a_full_disk_is_no_failure(run: RunDirectory, monkeypatch: pytest.MonkeyPatch):
    run.logs.mkdir(parents=True)
    run.events.symlink_to("/dev/full")
    with events(run) as log:
        log.write("lost")
    assert run.events.is_symlink()


def test_a_training_of_two_ranks_says_who_did_what_at_which_step(tiny: dict[str, Any]):
    """What the flow says beside them is seen in test_pipeline."""
    directory = begin(make(tiny, name="two", training={"processes": 2, "steps": 4, "checkpoint_interval": 2}))
    train(directory)
    found = lines(directory)
    assert {each["run"] for each in found} == {"two"}
    started = {each["rank"] for each in found if each["message"].startswith("Starting at step 0")}
    assert started == {0, 1}
    saved = [(each["rank"], each["step"]) for each in found if each["message"].startswith("Saved")]
    assert saved == [(0, 2), (0, 4)]
