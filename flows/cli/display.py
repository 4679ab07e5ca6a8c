"""What a person sees while the work runs: a live table on a terminal, plain lines in a pipe, and logs beside it."""

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.cli.endings import silence
from pipelines import progress
from pipelines.plain_lines import PlainLines
from pipelines.progress import Progress
from pipelines.stage_view import StageView, clock


def tell(line: str) -> None:
    """Write a line about work that goes on to standard error; where nobody reads that any more, it goes on untold."""
    _write(lambda: print(line, file=sys.stderr, flush=True))


def _write(do: Callable[[], None]) -> None:
    """Do what writes to standard error; where that is a closed pipe, or a terminal that is gone, it is silenced."""
    try:
        do()
    except OSError:
        silence(sys.stderr)


@contextmanager
def shown_progress() -> Iterator[None]:
    """Show every progress report of this process, and warnings, on standard error for the duration.

    Enter it before Prefect is imported: a root logger that has a handler already keeps it to itself, so Prefect
    does not print its own log lines into the picture; its handler that sends them to the API is not touched.
    """
    console = Console(stderr=True, highlight=False)
    is_live = sys.stderr.isatty() and not console.is_dumb_terminal
    with (
        _live(console) if is_live else _plain(tell) as write,
        _logs(write),
    ):
        yield


@contextmanager
def _plain(write: Callable[[str], None]) -> Iterator[Callable[[str], None]]:
    lines = PlainLines(write)
    stop = progress.listen(lines)
    try:
        yield write
    finally:
        stop()
        lines.close()


@contextmanager
def _live(console: Console) -> Iterator[Callable[[str], None]]:
    table = LiveTable(console)
    # Anything that is printed meanwhile goes above the table; standard output only where it is the same terminal.
    live = Live(
        console=console,
        get_renderable=table.render,
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=True,
    )
    stop = progress.listen(table)
    _write(live.start)
    try:
        yield lambda line: _write(lambda: console.print(escape(line), soft_wrap=True))
    finally:
        stop()
        _write(live.stop)


class LiveTable:
    """Listens to progress and draws a line for each stage, and below them the figures of those that go on."""

    def __init__(self, console: Console):
        self._console = console
        self._stages: dict[str, StageView] = {}
        self._lock = threading.Lock()

    def __call__(self, report: Progress) -> None:
        with self._lock:
            view = self._stages.get(report.stage)
            if view is None:
                self._stages[report.stage] = StageView.begun(report)
            else:
                view.hear(report)

    def render(self) -> RenderableType:
        with self._lock:
            views = list(self._stages.values())
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(5):
            grid.add_column(no_wrap=True)
        width = max(6, min(40, self._console.width - 54))
        below: list[RenderableType] = []
        for view in views:
            grid.add_row(*self._cells(view, width))
            if not view.is_done and view.values():
                below.append(Padding(Text(view.values(), "cyan"), (0, 0, 0, 2)))
            if not view.is_done and view.latest.message:
                below.append(Text(f"  {view.latest.message}", "dim", no_wrap=True, overflow="ellipsis"))
        return Group(grid, *below)

    def _cells(self, view: StageView, width: int) -> list[RenderableType]:
        left = view.left()
        total = view.latest.total
        mark = Text("✓ ", "green") if view.is_done else Text("▶ ", "cyan")
        time_left = "" if view.is_done else f"{clock(left)} left" if left is not None else "-:-- left"
        return [
            mark + Text(view.latest.stage, "bold" if not view.is_done else ""),
            ProgressBar(total=total or None, completed=view.latest.done, width=width, pulse=not total),
            Text(view.count()),
            Text(clock(view.elapsed()), "dim"),
            Text(time_left),
        ]


@contextmanager
def _logs(write: Callable[[str], None]) -> Iterator[None]:
    handler = TerminalLog(write)
    root, ours = logging.getLogger(), logging.getLogger("codecmill")
    former = ours.level
    ours.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        ours.setLevel(former)


class TerminalLog(logging.Handler):
    """Shows warnings, our own news and Prefect's retries; not what the end of the command says anyway."""

    def __init__(self, write: Callable[[str], None]):
        super().__init__()
        self._write_line = write
        # Prefect takes only a handler with a formatter for the application's own.
        self.setFormatter(logging.Formatter("%(message)s"))
        self.addFilter(_is_news)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write_line(self.format(record))
        except Exception:  # as every handler does: a failure to log is no failure of the work
            self.handleError(record)


def _is_news(record: logging.LogRecord) -> bool:
    if record.name.startswith("prefect"):
        if "Retry" in record.getMessage():
            return True
        # Errors of tasks and flows are raised too, and end the command with their message.
        is_of_run = record.name.startswith(("prefect.flow_runs", "prefect.task_runs"))
        return record.levelno == logging.WARNING if is_of_run else record.levelno >= logging.ERROR
    return record.levelno >= logging.WARNING or record.name.startswith("codecmill")
