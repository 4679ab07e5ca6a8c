"""The environment of programs that are to have servers of their own, or none, whatever the user's shell names."""

import os

from pipelines.storage.address import STORE
from pipelines.training.rendezvous import VARIABLE as RENDEZVOUS


def without_servers() -> dict[str, str]:
    """This process's environment, less what names Prefect's and MLflow's servers, the store and where hosts meet.

    What is tried or measured would else be registered among the user's models, or be taken from their store, done
    already, so that nothing of it is tried.
    """
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_")) and name not in (STORE, RENDEZVOUS)
    }
