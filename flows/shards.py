"""Images to a shard set, encoded in parallel by tasks."""

from prefect import flow

from pipelines.config import RunConfig
from pipelines.data import shards
from tasks.checkpoints import recorded_shard_set, shard_set_at
from tasks.progress import logged
from tasks.runs import HOOKS, at_work, flow_run_name
from tasks.shards import encode_all
from tasks.values import HeldRun, ShardSetReference


@flow(name="shards", flow_run_name=flow_run_name, **HOOKS)
def create_shards(config: RunConfig) -> ShardSetReference:
    """Make the shard set of a config's images, or find it made."""
    at_work(config)
    with logged():
        made = shards.create_shards(config, run_parts=lambda orders: encode_all(orders, config.data))
    return shard_set_at(made.path)


def shards_of(run: HeldRun) -> ShardSetReference:
    """The shard set that a run began with, whatever has become of its images since; a new run's is made."""
    return recorded_shard_set(run) or create_shards(run.directory.read_config())
