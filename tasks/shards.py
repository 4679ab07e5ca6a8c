"""Shard creation as tasks: each encodes some of the images, on the task runner that the config names."""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterId
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from pipelines.config import DataConfig
from pipelines.data.encoding import EncodingOrder, encode_sources
from pipelines.errors import CodecmillError
from pipelines.process_lifetime import die_with_parent
from tasks import clusters
from tasks.crashed_flows import mark_tasks_crashed
from tasks.retrying import unless_explained

RESTARTS = 2
"""Of the pool of processes."""

LONGEST_SECONDS = 6 * 3600.0
"""Of one task. Only a process can be held to it: in threads Prefect says with each task that it cannot."""

LITTLE_BYTES = 8 * 2**20
"""Of images: threads have encoded so many sooner than processes have started, which takes them four seconds."""


@task(
    name="encode",
    task_run_name="encode from {order.jobs[0].path}",
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=unless_explained,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def encode(order: EncodingOrder) -> int:
    """Cut some images into patches; returns how many images."""
    encode_sources(order)
    return len(order.jobs)


def encode_all(orders: Sequence[EncodingOrder], data: DataConfig) -> Iterator[int]:
    """Encode all orders in parallel; yields the number of images of each as it is done.

    A killed process breaks the whole pool, and no retry of a task reaches beyond its process: what is left is given to
    a new pool, `RESTARTS` times.

    Raises:
        CodecmillError: what the first failing order raised, or that processes were killed again and again.
    """
    left = list(orders)
    killed: set[UUID] = set()
    for restarts in range(RESTARTS + 1):
        futures: dict[PrefectFuture[int], EncodingOrder] = {}
        try:
            with _runner(data, orders) as runner:
                limited = encode.with_options(timeout_seconds=LONGEST_SECONDS)
                each = limited if isinstance(runner, ProcessPoolTaskRunner) else encode
                futures.update({runner.submit(each, {"order": order}): order for order in left})
                for future in as_completed(list(futures)):
                    count = future.result()
                    left.remove(futures[future])
                    yield count
            break
        except BrokenProcessPool as error:
            killed.update(future.task_run_id for future, order in futures.items() if order in left)
            _mark_crashed(killed)
            if restarts == RESTARTS:
                raise CodecmillError(
                    f"A process that encodes images was killed, {RESTARTS + 1} times. If memory ran out, lower "
                    "data.workers; what is done is kept."
                ) from error
            get_run_logger().warning("A process that encodes images was killed; the rest goes on in new ones.")
    _mark_crashed(killed)  # what a killed process had reported may have arrived after the first time


def _mark_crashed(task_runs: Collection[UUID]) -> None:
    """The tasks whose processes were killed cannot say so themselves."""

    async def mark() -> None:
        async with get_client() as client:
            which = TaskRunFilter(id=TaskRunFilterId(any_=list(task_runs)))
            await mark_tasks_crashed(client, which, "The process that encoded was killed.")

    if task_runs:
        asyncio.run(mark())


@contextmanager
def _runner(data: DataConfig, orders: Sequence[EncodingOrder]) -> Iterator[TaskRunner[Any]]:
    is_little = sum(job.bytes for order in orders for job in order.jobs) <= LITTLE_BYTES
    if data.task_runner == "threads" or (data.task_runner == "auto" and is_little):
        with ThreadPoolTaskRunner(max_workers=data.workers) as threads:
            yield threads
        return
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    # Without the address each process would start an ephemeral server of its own.
    with temporary_settings({PREFECT_API_URL: url}), _processes(data) as processes:
        yield processes


def _processes(data: DataConfig) -> TaskRunner[Any]:
    if data.task_runner == "dask":
        return clusters.dask(data.workers)
    if data.task_runner == "ray":
        return clusters.ray()
    return ProcessPoolTaskRunner(max_workers=data.workers, initializer=die_with_parent)
