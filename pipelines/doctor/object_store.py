"""The store at `s3://` that the environment names: whether it answers, can be written, and keeps two machines apart."""

from collections.abc import Iterator
from uuid import uuid4

from pipelines.doctor.findings import Finding, fault, good, note
from pipelines.doctor.s3_server import endpoint
from pipelines.errors import CodecmillError
from pipelines.storage import STORE, open_store, store_url
from pipelines.tracking import without_password

PATIENCE_SECONDS = 4.0


def examine_store() -> Iterator[Finding]:
    """`CODECMILL_STORE`, by an object that is written, read and deleted."""
    try:
        url = store_url()
        if url is None:
            yield good("store", f"none is named ({STORE}): runs and shard sets are on this disk only")
            return
        store, key = open_store(url), f".tmp-doctor-{uuid4().hex}"
        store.find(key, seconds=PATIENCE_SECONDS)
        try:
            written = store.write_if(key, b"doctor", None)
            takes_conditions = written is not None and store.write_if(key, b"other", "0" * 32) is None
            store.read(key)
        finally:
            store.remove(key)
    except CodecmillError as error:
        text, _, remedy = str(error).partition(". ")
        yield fault("store", text.rstrip("."), remedy or f"Look at {STORE} and at AWS's variables.")
        return
    address = endpoint()
    at = f" at {without_password(address)}" if address else ""
    yield good("store", f"{url}{at} can be written and read")
    if takes_conditions:
        yield good("lease", "two machines cannot work on one run")
    else:
        remedy = "Do not start one run on two machines at once."
        yield note("lease", f"{url} writes under conditions that do not hold (If-Match)", remedy)
