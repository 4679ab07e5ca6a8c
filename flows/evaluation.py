"""A trained run to a report and a registered version."""

from prefect import flow

from pipelines.config import RunConfig
from tasks.checkpoints import trained
from tasks.evaluation import evaluate
from tasks.promotion import register
from tasks.runs import held
from tasks.values import EvaluationReference


@flow(name="evaluation", flow_run_name="evaluation {config.name}")
def evaluation(config: RunConfig) -> EvaluationReference:
    """Evaluate the newest checkpoint of a run; on its test split, register and promote it too."""
    with held(config) as run:
        shard_set, checkpoint = trained(run)
        result = evaluate(run, shard_set, checkpoint)
        if config.evaluation.images is None:
            register(run, shard_set, checkpoint, result)
        return result
