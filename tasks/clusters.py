"""Task runners whose workers may be on other hosts: Dask's and Ray's, each an extra of the installation."""

import os
from typing import Any

from prefect.task_runners import TaskRunner

from pipelines.errors import InputError


def dask(workers: int) -> TaskRunner[Any]:
    """On the cluster that `DASK_SCHEDULER_ADDRESS` names, else on one of this machine's processes.

    Raises:
        InputError: Dask is not installed.
    """
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise _missing("dask") from error
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    if address:
        return DaskTaskRunner(address=address)
    here = {"host": "127.0.0.1", "dashboard_address": None, "n_workers": workers, "threads_per_worker": 1}
    return DaskTaskRunner(cluster_kwargs=here)


def ray() -> TaskRunner[Any]:
    """On the cluster that `RAY_ADDRESS` names.

    None is started here: Ray's would listen to the network, and leave processes behind where this one is killed.

    Raises:
        InputError: Ray is not installed, or no cluster is named.
    """
    try:
        from prefect_ray import RayTaskRunner  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise _missing("ray") from error
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        raise InputError(
            "data.task_runner is ray, but RAY_ADDRESS names no cluster. Start one (ray start --head) and set it to its "
            "address, or to auto, or use --data.task_runner processes."
        )
    return RayTaskRunner(address=address)


def _missing(name: str) -> InputError:
    return InputError(
        f"data.task_runner is {name}, which is not installed. Install it, pip install -c requirements.lock -e "
        f"'.[{name}]', or use --data.task_runner processes."
    )
