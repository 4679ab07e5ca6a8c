"""The command line, `codecmill` and `python -m flows`: understand what was typed, do it, say how it ended."""

import sys
from collections.abc import Sequence


def main(typed: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 failed, 2 input, 3 busy, 129 SIGHUP, 130 SIGINT, 143 SIGTERM."""
    try:
        from flows.cli.endings import carry_out  # a quarter of a second, in which Ctrl-C may come, too

        return carry_out(sys.argv[1:] if typed is None else typed)
    except KeyboardInterrupt:
        print("codecmill: Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
