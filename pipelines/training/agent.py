"""torchrun, tied to the life of whoever started it: `python -m pipelines.training.agent TORCHRUN_ARGUMENTS`."""

import os
import sys

from pipelines.process_lifetime import die_with_parent, parent_environment


def main() -> None:
    die_with_parent()
    os.environ.update(parent_environment())  # the ranks' parent is this process
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except ChildFailedError:
        sys.exit(1)  # why, the rank has written down: see worker


if __name__ == "__main__":
    main()
