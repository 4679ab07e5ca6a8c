"""A trained run to a report and a registered version."""

from prefect import flow

from pipelines.config import RunConfig
from pipelines.runs import evaluation_of
from tasks.checkpoints import trained
from tasks.evaluation import evaluate
from tasks.promotion import register
from tasks.runs import HOOKS, flow_run_name, held_as_it_is
from tasks.values import EvaluationReference


@flow(name="evaluation", flow_run_name=flow_run_name, **HOOKS)
def evaluation(config: RunConfig) -> EvaluationReference:
    """Evaluate the best checkpoint of a run; on its test split, register and promote it too.

    What of `config.evaluation` is not given, as on Prefect's form, is as the run has it.
    """
    with held_as_it_is(config) as run:
        choice = evaluation_of(run.directory, config.evaluation)
        shard_set, checkpoint = trained(run)
        result = evaluate(run, shard_set, checkpoint, choice)
        if choice.images is None:
            register(run, shard_set, checkpoint, result, choice)
        return result
