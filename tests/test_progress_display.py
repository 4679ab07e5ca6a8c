"""What is shown while the work runs: plain lines in a pipe, a live table on a terminal, logs beside it."""

import io
import logging
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from flows.cli.display import LiveTable, TerminalLog
from pipelines import stage_view
from pipelines.plain_lines import PlainLines
from pipelines.progress import Progress
from pipelines.stage_view import StageView, clock


def steps(done: int, total: int = 100, message: str = "", **values: float) -> Progress:
    return Progress("training", done, total, "steps", message, values)


def test_plain_lines_are_the_first_the_last_and_few_between():
    lines: list[str] = []
    listener = PlainLines(lines.append, seconds=0.2)
    begun = time.monotonic()
    for done in range(101):
        listener(steps(done, loss=0.5))
        time.sleep(0.005)
    seconds = time.monotonic() - begun
    assert lines[0].startswith("training 0/100 steps  0 %")
    assert re.fullmatch(r"training 100/100 steps  done in 0:0\d  loss 0\.5", lines[-1])
    assert 2 <= len(lines) - 2 <= seconds / 0.2
    assert re.fullmatch(r"training \d+/100 steps  \d+ %  0:0\d left  loss 0\.5", lines[1])
    listener.close()
    assert lines[-2] != lines[-1]


def test_a_report_that_was_held_back_is_told_at_the_end_and_only_once():
    lines: list[str] = []
    listener = PlainLines(lines.append, seconds=60)
    for done in range(5):
        listener(steps(done))
    assert len(lines) == 1
    listener.close()
    assert [line.partition("  ")[0] for line in lines] == ["training 0/100 steps", "training 4/100 steps"]
    listener.close()
    assert len(lines) == 2


def test_stages_do_not_hold_each_other_back():
    lines: list[str] = []
    listener = PlainLines(lines.append, seconds=60)
    listener(Progress("shards", 1, 0, "images", "Reading a.png"))
    listener(steps(3, psnr=24.321, validation_psnr=20.0))
    assert lines == [
        "shards 1 images  Reading a.png",
        "training 3/100 steps  3 %  PSNR 24.32 dB  validation PSNR 20.00 dB",
    ]


class Watch:
    """A clock that is set by hand."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """What stages are timed by."""
    monkeypatch.setattr(stage_view, "time", watch := Watch())
    return watch


def test_time_left_counts_from_where_a_resumed_stage_began(watch: Watch):
    view = StageView.begun(steps(50))
    view.hear(steps(51))
    assert view.left() is None
    watch.seconds = 40
    view.hear(steps(71))
    assert view.left() == 58, "29 steps, of which 20 took 40 s"
    watch.seconds = 50
    assert view.left() == 48


@pytest.mark.parametrize("origin", [0, 30])
def test_time_left_does_not_count_the_preparations(origin: int, watch: Watch):
    view = StageView.begun(steps(origin))
    view.hear(steps(origin, message="Starting the ranks"))
    watch.seconds = 500
    view.hear(steps(origin + 1, message="Starting at step 0"))
    assert view.left() is None
    watch.seconds = 517
    view.hear(steps(origin + 35))
    assert view.left() == (65 - origin) / 2


@pytest.mark.parametrize(
    ("logger", "level", "message", "is_shown"),
    [
        ("codecmill.checkpoints", logging.INFO, "news", True),
        ("elsewhere", logging.INFO, "chatter", False),
        ("elsewhere", logging.WARNING, "careful", True),
        ("prefect.task_runs", logging.INFO, "Finished in state Completed()", False),
        ("prefect.task_runs", logging.INFO, "Task run failed with exception: x - Retry 1/2 will start 10 s", True),
        ("prefect.flow_runs", logging.WARNING, "said by a task", True),
        ("prefect.flow_runs", logging.ERROR, "Encountered exception during execution", False),
    ],
)
def test_only_news_reach_the_terminal(logger: str, level: int, message: str, is_shown: bool):
    lines: list[str] = []
    TerminalLog(lines.append).handle(logging.LogRecord(logger, level, "f.py", 1, message, None, None))
    assert lines == ([message] if is_shown else [])


def test_a_stage_that_counts_anew_is_told_anew():
    lines: list[str] = []
    listener = PlainLines(lines.append, seconds=60)
    for done, total, unit in [(0, 2, "images"), (2, 2, "images"), (2, 2, "images"), (0, 1, "shards"), (1, 1, "shards")]:
        listener(Progress("shards", done, total, unit))
    listener.close()
    assert [line.partition("  ")[0] for line in lines] == [
        "shards 0/2 images",
        "shards 2/2 images",
        "shards 0/1 shards",
        "shards 1/1 shards",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")])
def test_clock(seconds: float, text: str):
    assert clock(seconds) == text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_says_everything(width: int):
    table = LiveTable(Console(width=width, force_terminal=True))
    table(Progress("shards", 27, 27, "images"))
    table(steps(70_000, 200_000, "rank 0: " + "x" * 300, loss=0.0123, psnr=24.31))
    table(Progress("evaluation", 2, 0, "images"))
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(table.render())
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert re.match(r"✓ shards .* 27/27 images +0:00", lines[0])
    assert re.match(r"▶ training .* 70000/200000 steps +0:00 +-:-- left", lines[1])
    assert re.match(r"▶ evaluation .* 2 images", lines[2])
    assert lines[3].strip() == "loss 0.0123  PSNR 24.31 dB"
    assert lines[4].rstrip().endswith("…")


SCRIPT = """
import logging, sys, time
from flows.cli.display import shown_progress
from pipelines.progress import Progress, report
with shown_progress():
    for done in range(21):
        report(Progress("training", done, 20, "steps", "", {"loss": 0.25}))
        time.sleep(0.03)
        if done == 10:
            logging.getLogger("codecmill.checkpoints").warning("Skipping [damaged] checkpoint")
            logging.getLogger("elsewhere").info("not worth it")
            print("printed")
            print("complained", file=sys.stderr)
print("result")
"""


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    return {**kept, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm-256color", **more}


def on_a_terminal(**more: str) -> str:
    """What the script writes to a terminal of 80 columns, escape sequences and all."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(COLUMNS="80", **more),
    )
    os.close(theirs)
    written = b""
    while select.select([ours], [], [], 30)[0]:
        try:
            written += os.read(ours, 65536)
        except OSError:
            break
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


def test_in_a_pipe_there_are_plain_lines_on_standard_error_and_the_result_on_standard_output():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout == "printed\nresult\n"
    lines = result.stderr.splitlines()
    assert lines[0] == "training 0/20 steps  0 %  loss 0.25"
    assert lines[1:3] == ["Skipping [damaged] checkpoint", "complained"]
    assert re.fullmatch(r"training 20/20 steps  done in 0:0\d  loss 0\.25", lines[3])
    assert len(lines) == 4
    assert "\x1b" not in result.stderr


def test_on_a_terminal_the_table_lives_and_what_is_printed_stays_above_it():
    text = on_a_terminal()
    assert text.count("training") >= 3
    assert "\x1b[?25l" in text
    assert text.rindex("\x1b[?25h") > text.rindex("training")
    for line in ("Skipping [damaged] checkpoint", "printed", "complained"):
        assert text.count(line) == 1
        assert text.index(line) < text.rindex("20/20 steps")
    assert "not worth it" not in text
    assert text.rstrip().endswith("result")
    assert re.search(r"\x1b\[[\d;]*3[0-9]", text)


def test_no_color_is_respected():
    assert not re.search(r"\x1b\[[\d;]*3[0-9][;m]", on_a_terminal(NO_COLOR="1"))


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines():
    text = on_a_terminal(TERM="dumb")
    assert "\x1b" not in text
    assert "training 0/20 steps  0 %  loss 0.25" in text


def test_work_outlives_the_terminal_that_it_is_shown_on():
    """As where a session is left: what is written meets an error from then on."""
    ours, theirs = pty.openpty()
    script = SCRIPT.replace('print("complained", file=sys.stderr)', "pass")
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment(COLUMNS="80")) as process:
        os.close(theirs)
        assert os.read(ours, 65536), "it is shown"
        os.close(ours)
        assert process.stdout is not None
        assert process.stdout.read() == b"printed\nresult\n"
    assert process.returncode == 0
