"""The only room where MLflow is spoken: a view of the run directories that can be rebuilt from them.

MLflow is imported when a function is called (1.3 s), never when this package is. All functions raise
`TrackingUnavailable` when MLflow cannot be reached, and may be called again with nothing doubled. What is sent is
sent when they return, whatever `MLFLOW_ENABLE_ASYNC_LOGGING` says, for it is marked as sent then. Those that take a run
write its `mlflow_run.json`: call them from one process at a time, the holder of the run's lock.
"""

from pipelines.tracking.artifacts import EVALUATION, log_checkpoint, log_evaluation, log_pictures
from pipelines.tracking.connection import (
    EXPERIMENT,
    TrackingUnavailable,
    ensure_database,
    is_current,
    is_server,
    is_unmade,
    shown_place,
    tracking_uri,
    without_password,
)
from pipelines.tracking.descriptions import describe
from pipelines.tracking.fetching import RUN_ADDRESS, fetch_checkpoint, registered
from pipelines.tracking.offline import MODEL_ADDRESS, NoVersionError, registered_offline
from pipelines.tracking.registry import (
    CHAMPION,
    MODEL,
    Version,
    champion,
    promote,
    record_evaluation,
    register_model,
    version_with,
)
from pipelines.tracking.runs import TrackedRun, log_metrics, log_shard_set, open_run, set_status, ship_journal, tracked
from pipelines.tracking.syncing import begin, bring_level, release, sync

__all__ = [
    "CHAMPION",
    "EVALUATION",
    "EXPERIMENT",
    "MODEL",
    "MODEL_ADDRESS",
    "RUN_ADDRESS",
    "NoVersionError",
    "TrackedRun",
    "TrackingUnavailable",
    "Version",
    "begin",
    "bring_level",
    "champion",
    "describe",
    "ensure_database",
    "fetch_checkpoint",
    "is_current",
    "is_server",
    "is_unmade",
    "log_checkpoint",
    "log_evaluation",
    "log_metrics",
    "log_pictures",
    "log_shard_set",
    "open_run",
    "promote",
    "record_evaluation",
    "register_model",
    "registered",
    "registered_offline",
    "release",
    "set_status",
    "ship_journal",
    "shown_place",
    "sync",
    "tracked",
    "tracking_uri",
    "version_with",
    "without_password",
]
