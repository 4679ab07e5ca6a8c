"""All examinations, in the order in which they are told."""

from collections.abc import Iterator
from itertools import chain

from pipelines.doctor.findings import Finding
from pipelines.doctor.machine import examine_machine
from pipelines.doctor.object_store import examine_store
from pipelines.doctor.s3_server import examine_s3
from pipelines.doctor.servers import examine_mlflow, examine_prefect
from pipelines.doctor.services_file import examine_services_file
from pipelines.doctor.storage import examine_storage
from pipelines.run_directory import Root


def examine(root: Root) -> Iterator[Finding]:
    """Look at the machine, the root and the configured servers; each finding comes when it is known."""
    return chain(
        examine_machine(),
        examine_storage(root),
        examine_services_file(root),
        examine_prefect(),
        examine_mlflow(root),
        examine_s3(),
        examine_store(),
    )
