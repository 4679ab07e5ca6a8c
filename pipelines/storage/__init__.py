"""The only room where object storage is spoken (fsspec's s3fs): a second home for runs and shard sets, at `s3://`.

s3fs is imported when a store is opened (0.3 s), never when this package is. The disk stays the truth of the machine;
what lies in a store is believed only when its size and digest are what was recorded of it.
"""

from pipelines.storage.address import STORE, store_url
from pipelines.storage.objects import Object
from pipelines.storage.patience import (
    DamagedObject,
    MissingObject,
    StoreError,
    StoreFailed,
    StoreRefused,
    StoreUnavailable,
)
from pipelines.storage.store import Store, open_store

__all__ = [
    "STORE",
    "DamagedObject",
    "MissingObject",
    "Object",
    "Store",
    "StoreError",
    "StoreFailed",
    "StoreRefused",
    "StoreUnavailable",
    "open_store",
    "store_url",
]
