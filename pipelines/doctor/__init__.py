"""Whether this machine, the root and the servers that are named can carry a run: looked at in seconds, changed nothing.

Nothing here imports Prefect or MLflow: their servers are asked over HTTP, as anybody could ask them.
"""

from pipelines.doctor.examination import examine
from pipelines.doctor.findings import Finding, State

__all__ = ["Finding", "State", "examine"]
