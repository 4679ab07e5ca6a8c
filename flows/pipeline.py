"""The whole DAG: images to shards to a trained model to a report and a registered version."""

from prefect import flow

from flows.shards import create_shards
from pipelines.config import RunConfig
from tasks.evaluation import evaluate
from tasks.promotion import register
from tasks.runs import held
from tasks.training import train
from tasks.values import RunSummary


@flow(name="codecmill", flow_run_name="codecmill {config.name}", validate_parameters=True)
def training_pipeline(config: RunConfig) -> RunSummary:
    """From a folder of images to an evaluated, registered model."""
    with held(config) as run:
        shard_set = create_shards(run.directory.read_config())
        checkpoint = train(run, shard_set)
        evaluation = evaluate(run, shard_set, checkpoint, config.evaluation.model_copy(update={"images": None}))
        registration = register(run, shard_set, checkpoint, evaluation)
        if config.evaluation.images is not None:
            evaluate(run, shard_set, checkpoint, config.evaluation)
        return RunSummary(
            run=run.path,
            shard_set=shard_set,
            checkpoint=checkpoint,
            evaluation=evaluation,
            registration=registration,
        )
