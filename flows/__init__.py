"""When: which stage follows which."""

import os

# Where a flow is called from Python with no server about, Prefect starts one of its own and gives it 20 seconds, which
# on a busy machine are not enough. Read when Prefect is imported.
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
