"""services.env: whose addresses are used, and whether the secrets are kept from others."""

import os
from collections.abc import Iterator

from pipelines.doctor.findings import Finding, fault, good
from pipelines.errors import InputError
from pipelines.run_directory import Root
from pipelines.service_addresses import SECRETS_FILE, read_variables, secrets_file
from pipelines.tolerant_reading import exists


def examine_services_file(root: Root) -> Iterator[Finding]:
    """What a root's services.env says, where there is one."""
    if not exists(root.services_file):
        return
    try:
        settings = read_variables(root.services_file)
        secrets = secrets_file(root, settings)
        names = settings if secrets is None else settings | read_variables(secrets)
    except InputError as error:
        yield fault("services.env", str(error), "Start the services again: make services")
        return
    others = [name for name in settings if name != SECRETS_FILE and os.environ.get(name) != settings[name]]
    beside = f"; the environment says otherwise for {', '.join(others)}" if others else ""
    yield good(
        "services.env", f"names {', '.join(name for name in settings if 'URL' in name or 'URI' in name)}{beside}"
    )
    if secrets is not None and names is not settings:
        mode = secrets.stat().st_mode & 0o777
        if mode & 0o077:
            yield fault("secrets", f"others can read {secrets} (mode {mode:03o})", f"chmod 600 {secrets}")
        else:
            yield good("secrets", f"{secrets} is for its owner alone")
