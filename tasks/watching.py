"""What is new since the champion, as a task."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines.config import RunConfig, Section
from pipelines.errors import InputError
from pipelines.run_directory import Root
from tasks.retrying import unless_explained
from tasks.values import ShardSetReference


class News(Section):
    """What a look has found."""

    images: int
    """That are new to the champion and to what went on from it."""
    champion: str | None
    """Where its weights are, if there is one."""
    cut_off: RunConfig | None
    """Of a training that an earlier look began, and that was ended before it was done."""
    others: tuple[str, ...]
    """Runs under the root that somebody is at work on: a training beside them would slow them down, and may know less
    than they will."""


def must_be_another_run(config: RunConfig) -> None:
    """See that a look which finds enough would not find its run done long ago.

    Raises:
        InputError: the name is always the same, and that run is done.
    """
    run = Root(config.root.absolute()).run(config.name)
    if "{" not in config.name and run.promotion_file.is_file():
        raise InputError(
            f"Run '{config.name}' is done, and a watch with this name would begin no other: give each its own, as by "
            f"name: {config.name}-{{date}}-{{time}}"
        )


# MLflow may be away for a moment; nothing has been begun.
@task(
    name="news",
    retries=5,
    retry_delay_seconds=[2, 10, 30, 60, 120],
    retry_condition_fn=unless_explained,
    timeout_seconds=3600,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def news(config: RunConfig, shard_set: ShardSetReference) -> News:
    """Compare a shard set with those that the champion, and what went on from it, were trained on.

    Args:
        config: of the look, its name not filled in.
    """
    from pipelines import tracking
    from pipelines.data.shard_set import ShardSet
    from pipelines.watching import cut_off, new_images, runs_at_work

    root = Root(config.root.absolute())
    champion = tracking.champion(root)
    log = get_run_logger()
    images = new_images(ShardSet.open(shard_set.path), root, champion, warn=log.warning)
    log.info("%d images are new to the champion and to what went on from it", images)
    others = runs_at_work(root)
    if others:
        log.info("No training begins beside those at work: %s", ", ".join(others))
    interrupted = cut_off(config, root, champion)
    if interrupted:
        log.info("The training of '%s' was ended before it was done", interrupted.name)
    source = f"models:/{tracking.MODEL}@champion" if champion else None
    return News(images=images, champion=source, cut_off=interrupted, others=others)
