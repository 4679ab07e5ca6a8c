"""What is new since the champion, as a task."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines.config import RunConfig, Section
from tasks.values import ShardSetReference


class News(Section):
    """Images that are new to the champion and to what went on from it, and where its weights are, if there is one."""

    images: int
    champion: str | None


# MLflow may be away for a moment; nothing has been begun.
@task(
    name="news",
    retries=5,
    retry_delay_seconds=[2, 10, 30, 60, 120],
    timeout_seconds=3600,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def news(config: RunConfig, shard_set: ShardSetReference) -> News:
    """Compare a shard set with those that the champion, and what went on from it, were trained on."""
    from pipelines import tracking
    from pipelines.data.shard_set import ShardSet
    from pipelines.run_directory import Root
    from pipelines.watching import new_images

    root = Root(config.root.absolute())
    champion = tracking.champion(root)
    log = get_run_logger()
    images = new_images(ShardSet.open(shard_set.path), root, champion, warn=log.warning)
    log.info("%d images are new to the champion and to what went on from it", images)
    return News(images=images, champion=f"models:/{tracking.MODEL}@champion" if champion else None)
