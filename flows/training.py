"""Images to a trained model: the shard set is made if it is not there."""

from prefect import flow

from flows.shards import shards_of
from pipelines.config import RunConfig
from tasks.runs import HOOKS, flow_run_name, held
from tasks.training import train
from tasks.values import CheckpointReference


@flow(name="training", flow_run_name=flow_run_name, **HOOKS)
def training(config: RunConfig) -> CheckpointReference:
    """Train a run to its last step, from wherever it is."""
    with held(config) as run:
        shard_set = shards_of(run)
        return train(run, shard_set)
