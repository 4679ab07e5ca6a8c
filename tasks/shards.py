"""Shard creation as tasks: each encodes some of the images, on the task runner that the config names."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from pipelines.config import DataConfig
from pipelines.data.encoding import EncodingOrder, encode_sources
from pipelines.data.encoding_worker import EncodingProcesses
from tasks import clusters
from tasks.retrying import unless_explained

LITTLE_BYTES = 8 * 2**20
"""Of images: threads of this process have encoded so many as soon as processes have started."""

Encode = Task[[EncodingOrder], int]


def encode_all(orders: Sequence[EncodingOrder], data: DataConfig) -> Iterator[int]:
    """Encode all orders in parallel; yields the number of images of each as it is done.

    Raises:
        CodecmillError: what the first failing order raised.
    """
    with _at_work(data, orders) as (runner, encode):
        futures: list[PrefectFuture[int]] = [runner.submit(encode, {"order": order}) for order in orders]
        for future in as_completed(futures):
            yield future.result()


@contextmanager
def _at_work(data: DataConfig, orders: Sequence[EncodingOrder]) -> Iterator[tuple[TaskRunner[Any], Encode]]:
    """What runs the tasks, and the task that it runs."""
    if data.task_runner in ("dask", "ray"):
        with _cluster(data) as cluster:
            yield cluster, encoding_by(_encode_here)
        return
    with ThreadPoolTaskRunner(max_workers=data.workers) as threads:
        is_little = sum(job.bytes for order in orders for job in order.jobs) <= LITTLE_BYTES
        if data.task_runner == "threads" or (data.task_runner == "auto" and is_little):
            yield threads, encoding_by(_encode_here)
            return
        # They are killed before the runner waits for its threads.
        with EncodingProcesses(min(data.workers, len(orders))) as processes:
            yield threads, encoding_by(processes.encode)


def encoding_by(do: Callable[[EncodingOrder], int]) -> Encode:
    """The task of cutting some images into patches, which is left to `do`; it returns how many images."""

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
        return do(order)

    return encode


def _encode_here(order: EncodingOrder) -> int:
    encode_sources(order)
    return len(order.jobs)


@contextmanager
def _cluster(data: DataConfig) -> Iterator[TaskRunner[Any]]:
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    # Without the address each process would start an ephemeral server of its own.
    with temporary_settings({PREFECT_API_URL: url}), _runner_of(data) as runner:
        yield runner


def _runner_of(data: DataConfig) -> TaskRunner[Any]:
    return clusters.dask(data.workers) if data.task_runner == "dask" else clusters.ray()
