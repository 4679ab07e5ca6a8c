"""What is new since the champion, as a task."""

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines.config import RunConfig, Section
from tasks.values import ShardSetReference


class News(Section):
    """Images that the champion was not trained on, and where its weights are; None before there is a champion."""

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
    """Compare a shard set with the one that the champion was trained on."""
    from pipelines import tracking
    from pipelines.data.shard_set import ShardSet
    from pipelines.errors import CodecmillError
    from pipelines.run_directory import Root
    from pipelines.storage import open_store, store_url
    from pipelines.storage.bringing import make_set_known

    root = Root(config.root.absolute())
    champion = tracking.champion(root)
    known: set[str] = set()
    if champion is not None:
        folder = root.shards / champion.fingerprint[:16]
        try:
            if url := store_url():
                make_set_known(folder, open_store(url))  # it may have been trained on another machine
            before = ShardSet.open(folder)
            known = {row.sha256 for split in before.manifest.sources for row in before.sources(split)}
        except CodecmillError as error:
            get_run_logger().warning("All images count as new: the champion's shard set is not there. %s", error)
    now = ShardSet.open(shard_set.path)
    found = {row.sha256 for split in now.manifest.sources for row in now.sources(split)}
    images = len(found - known)
    get_run_logger().info("%d of %d images are new to the champion", images, len(found))
    return News(images=images, champion=f"models:/{tracking.MODEL}@champion" if champion else None)
