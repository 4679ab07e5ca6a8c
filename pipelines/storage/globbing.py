"""Objects that a pattern names: a prefix with all below it, or a glob."""

import re
from collections.abc import Iterator

from pipelines.errors import InputError
from pipelines.storage.objects import Object
from pipelines.storage.store import Store, open_store


def matching(url: str) -> tuple[Store, str, Iterator[Object]]:
    """The objects that an address means: those below it, or, with any of `*?[`, those that match it.

    Returns:
        The bucket as a store, the part of the keys that is fixed, with a slash at its end or empty, and the objects.

    Raises:
        InputError: it is no such address. StoreError: from the iterator, where the store does not say.
    """
    scheme, _, path = url.partition("://")
    bucket, _, pattern = path.partition("/")
    store = open_store(f"{scheme}://{bucket}")
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if fixed is not None:
        prefix = "".join(f"{part}/" for part in parts[:fixed])
        return store, prefix, _like(store, prefix, pattern)
    whole = pattern.rstrip("/")
    if whole and (single := store.find(whole)):
        return store, whole[: whole.rfind("/") + 1], iter([single])
    prefix = f"{whole}/" if whole else ""
    return store, prefix, store.list(prefix)


def _like(store: Store, prefix: str, pattern: str) -> Iterator[Object]:
    from fsspec.utils import glob_translate

    try:
        expression = re.compile(glob_translate(pattern))
    except ValueError as error:
        raise InputError(f"{store.address(pattern)} is no glob: {error}. Use ** alone between slashes.") from error
    yield from (each for each in store.list(prefix) if expression.match(each.key))
