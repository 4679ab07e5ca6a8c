"""torchrun, tied to the life of whoever started it: `python -m pipelines.training.agent TORCHRUN_ARGUMENTS`."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from pipelines.durable_files import write_json
from pipelines.errors import CodecmillError
from pipelines.process_lifetime import die_with_parent, parent_environment
from pipelines.training.following import ATTEMPT, EXIT_CODES, LOST


def main() -> None:
    die_with_parent()
    os.environ.update(parent_environment())  # the ranks' parent is this process
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    from pipelines.training import membership, one_host

    membership.register()
    one_host.register()
    # Ranks that failed are told by `following.failure`, once.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun()
    except ChildFailedError as error:
        # A rank that raised has written down why (see worker); one that was killed could not.
        codes = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        with contextlib.suppress(CodecmillError, OSError):  # on a full disk the ranks have said why
            write_json(Path(os.environ[ATTEMPT]) / EXIT_CODES, codes)
        sys.exit(1)
    except SignalException as error:  # the ranks have been asked to save and end
        sys.exit(128 + error.sigval)
    except (RendezvousError, DistError) as error:
        print(f"This host is out of the rendezvous: {error.__cause__ or error or type(error).__name__}", flush=True)
        sys.exit(LOST)


if __name__ == "__main__":
    main()
