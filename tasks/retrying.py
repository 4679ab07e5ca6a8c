"""Which failures are worth another try."""

from typing import TYPE_CHECKING

from pipelines.errors import CodecmillError

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun


def unless_explained(task: "Task[..., object]", task_run: "TaskRun", state: "State[object]") -> bool:
    """Retry what may pass (a rank killed for memory, a server away), not what will fail the same way again.

    A plain CodecmillError is the latter: its message says what must change first.
    """
    error = state.result(raise_on_failure=False)
    return not isinstance(error, CodecmillError) or error.may_pass
