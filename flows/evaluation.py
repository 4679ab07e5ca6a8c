"""A trained run to a report and a registered version."""

from prefect import flow

from pipelines.config import RunConfig
from tasks.checkpoints import trained
from tasks.evaluation import evaluate
from tasks.promotion import register
from tasks.runs import HOOKS, flow_run_name, held_as_it_is
from tasks.values import EvaluationReference


@flow(name="evaluation", flow_run_name=flow_run_name, **HOOKS)
def evaluation(config: RunConfig) -> EvaluationReference:
    """Evaluate the best checkpoint of a run; on its test split, register and promote it too."""
    with held_as_it_is(config) as run:
        shard_set, checkpoint = trained(run)
        result = evaluate(run, shard_set, checkpoint, config.evaluation)
        if config.evaluation.images is None:
            register(run, shard_set, checkpoint, result, config.evaluation)
        return result
