"""Images to a trained model: the shard set is made if it is not there."""

from prefect import flow

from flows.shards import create_shards
from pipelines.config import RunConfig
from tasks.runs import held
from tasks.training import train
from tasks.values import CheckpointReference


@flow(name="training", flow_run_name="training {config.name}")
def training(config: RunConfig) -> CheckpointReference:
    """Train a run to its last step, from wherever it is."""
    with held(config) as run:
        shard_set = create_shards(run.directory.read_config())
        return train(run, shard_set)
