"""What `codecmill doctor` shows: a line for each finding as it is known, and what to do under those that ask for it."""

from collections.abc import Iterable

from rich.text import Text

from flows.cli.listing import output
from pipelines.doctor import Finding, State

_MARKS: dict[State, str] = {"good": "✓", "note": "!", "fault": "✗"}
_STYLES: dict[State, str] = {"good": "green", "note": "yellow", "fault": "red"}
_WIDTH = 18


def print_findings(findings: Iterable[Finding]) -> list[Finding]:
    """Print each as it comes; returns them all."""
    console = output()
    shown = []
    for finding in findings:
        shown.append(finding)
        mark = Text(f"{_MARKS[finding.state]} ", style=_STYLES[finding.state])
        console.print(mark + Text(f"{finding.about:{_WIDTH}}{finding.text}"), soft_wrap=True)
        if finding.remedy:
            console.print(Text(f"{'':{_WIDTH + 2}}{finding.remedy}", style="dim"), soft_wrap=True)
    return shown
