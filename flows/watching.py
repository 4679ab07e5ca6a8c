"""New images looked for, added to the shard set, and learnt from once there are enough of them."""

from prefect import flow, get_run_logger
from pydantic import PositiveInt

from flows.pipeline import training_pipeline
from flows.shards import create_shards
from pipelines.config import RunConfig
from pipelines.errors import CodecmillError, Interrupted
from pipelines.run_directory import Root
from tasks.runs import HOOKS, at_work, begun, is_first_try, named
from tasks.turns import turn
from tasks.values import RunSummary
from tasks.watching import must_be_another_run, news


@flow(name="watch", flow_run_name="watch {config.data.images}", **HOOKS)
def watch(config: RunConfig, enough: PositiveInt = 100) -> RunSummary | None:
    """Bring the shard set up to date, which costs what is new; with enough of it, go on from the champion.

    A retry goes on with the training that was begun, whatever has become of images and champion meanwhile. A later look
    goes on with one that was ended before it was done, as long as there is no other champion; where that cannot be
    brought to its end, it begins another. While another run under the root is at work, none is begun.

    Args:
        config: of the run that is started then; without a champion it starts from the beginning.
        enough: images that the champion, and what went on from it, were not trained on.
    """
    if is_first_try():  # a retry may find its run done but for the last word of it
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
        try:
            return training_pipeline(found.cut_off)
        except CodecmillError as error:
            if error.may_pass or isinstance(error, Interrupted):
                raise
            get_run_logger().warning("Another run is begun in the place of '%s': %s", found.cut_off.name, error)
    training = config.training.model_copy(update={"start_from": found.champion})
    return training_pipeline(config.model_copy(update={"training": training}))
