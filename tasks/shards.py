"""Shard creation as tasks: each encodes some of the images, on the task runner that the config names."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from pipelines.config import DataConfig
from pipelines.data.encoding import EncodingOrder, encode_sources
from pipelines.process_lifetime import die_with_parent
from tasks.retrying import unless_explained


# A retry helps where a process was killed for want of memory; images that are encoded already are not encoded again.
@task(
    name="encode",
    task_run_name="encode from {order.jobs[0].path}",
    tags=["shards"],
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=unless_explained,
    timeout_seconds=6 * 3600,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def encode(order: EncodingOrder) -> int:
    """Cut some images into patches; returns how many images."""
    encode_sources(order)
    return len(order.jobs)


def encode_all(orders: Sequence[EncodingOrder], data: DataConfig) -> Iterator[int]:
    """Encode all orders in parallel; yields the number of images of each as it is done.

    Raises:
        CodecmillError: what the first failing order raised.
    """
    with _runner(data) as runner:
        futures: Sequence[PrefectFuture[int]] = [runner.submit(encode, {"order": order}) for order in orders]
        for future in as_completed(list(futures)):
            yield future.result()


@contextmanager
def _runner(data: DataConfig) -> Iterator[ProcessPoolTaskRunner | ThreadPoolTaskRunner]:
    if data.task_runner == "threads":
        with ThreadPoolTaskRunner(max_workers=data.workers) as threads:
            yield threads
        return
    with get_client(sync_client=True) as client:
        url = str(client.api_url)
    # Without the address each process would start an ephemeral server of its own.
    with temporary_settings({PREFECT_API_URL: url}):
        runner = ProcessPoolTaskRunner(max_workers=data.workers, initializer=die_with_parent)
        with runner as processes:
            yield processes
