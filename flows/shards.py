"""Images to a shard set, encoded in parallel by tasks."""

from prefect import flow

from pipelines.config import RunConfig
from pipelines.data import shards
from tasks.checkpoints import shard_set_at
from tasks.progress import logged
from tasks.shards import encode_all
from tasks.values import ShardSetReference


@flow(name="shards", flow_run_name="shards for {config.name}")
def create_shards(config: RunConfig) -> ShardSetReference:
    """Make the shard set of a config's images, or find it made."""
    with logged():
        made = shards.create_shards(config, run_parts=lambda orders: encode_all(orders, config.data))
    return shard_set_at(made.path)
