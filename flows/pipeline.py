"""The whole DAG: images to shards to a trained model to a report and a registered version."""

from prefect import flow

from flows.shards import shards_of
from pipelines.config import RunConfig
from pipelines.run_directory import Root
from tasks.evaluation import evaluate, loaded_meanwhile
from tasks.promotion import register
from tasks.runs import HOOKS, flow_run_name, held
from tasks.training import train
from tasks.turns import turn
from tasks.values import RunSummary


@flow(name="codecmill", flow_run_name=flow_run_name, **HOOKS)
def training_pipeline(config: RunConfig) -> RunSummary:
    """From a folder of images to an evaluated, registered model."""
    with turn(Root(config.root.absolute())) as ended:
        return ended or _pipeline(config)


def _pipeline(config: RunConfig) -> RunSummary:
    config.must_have_a_test_split()
    with held(config) as run:
        shard_set = shards_of(run)
        with loaded_meanwhile():
            checkpoint = train(run, shard_set)
        evaluation = evaluate(run, shard_set, checkpoint, config.evaluation.model_copy(update={"images": None}))
        registration = register(run, shard_set, checkpoint, evaluation, config.evaluation)
        if config.evaluation.images is not None:
            evaluate(run, shard_set, checkpoint, config.evaluation)
        return RunSummary(
            run=run.path,
            shard_set=shard_set,
            checkpoint=checkpoint,
            evaluation=evaluation,
            registration=registration,
        )
