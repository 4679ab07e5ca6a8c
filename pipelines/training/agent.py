"""torchrun, tied to the life of whoever started it: `python -m pipelines.training.agent TORCHRUN_ARGUMENTS`."""

import os

from pipelines.process_lifetime import die_with_parent, parent_environment


def main() -> None:
    die_with_parent()
    os.environ.update(parent_environment())  # the ranks' parent is this process
    from torch.distributed.run import main as torchrun

    torchrun()


if __name__ == "__main__":
    main()
