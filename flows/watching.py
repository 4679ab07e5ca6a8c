"""New images looked for, added to the shard set, and learnt from once there are enough of them."""

from prefect import flow
from pydantic import PositiveInt

from flows.pipeline import training_pipeline
from flows.shards import create_shards
from pipelines.config import RunConfig
from pipelines.run_directory import Root
from tasks.runs import HOOKS, at_work, begun, named
from tasks.turns import turn
from tasks.values import RunSummary
from tasks.watching import must_be_another_run, news


@flow(name="watch", flow_run_name="watch {config.data.images}", **HOOKS)
def watch(config: RunConfig, enough: PositiveInt = 100) -> RunSummary | None:
    """Bring the shard set up to date, which costs what is new; with enough of it, go on from the champion.

    A retry goes on with the training that was begun, whatever has become of images and champion meanwhile; and so does
    a later look, where it was ended before it was done, unless there is another champion by then. While another run
    under the root is at work, none is begun: a later look does.

    Args:
        config: of the run that is started then; without a champion it starts from the beginning.
        enough: images that the champion, and what went on from it, were not trained on.
    """
    must_be_another_run(config)
    with turn(Root(config.root.absolute())) as ended:
        return ended or _watch(config, enough)


def _watch(look: RunConfig, enough: int) -> RunSummary | None:
    config = named(look)  # here: the flow run of the training is another one with each retry
    at_work(config)
    if (interrupted := begun(config)) is not None:
        return training_pipeline(interrupted)
    found = news(look, create_shards(config))
    if found.images < enough or found.others:
        return None
    if found.cut_off is not None:
        return training_pipeline(found.cut_off)
    training = config.training.model_copy(update={"start_from": found.champion})
    return training_pipeline(config.model_copy(update={"training": training}))
