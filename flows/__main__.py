"""The command line, `codecmill` and `python -m flows`: understand what was typed, do it, say how it ended."""

import sys
from collections.abc import Sequence

from flows.cli.endings import carry_out


def main(typed: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 input, 3 busy, 130 SIGINT, 143 SIGTERM."""
    return carry_out(sys.argv[1:] if typed is None else typed)


if __name__ == "__main__":
    sys.exit(main())
