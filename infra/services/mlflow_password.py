"""Gives MLflow's first user the password that the environment has; a program, since importing MLflow takes seconds.

`python -m infra.services.mlflow_password DATABASE`, with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. It goes
past MLflow's server, by its own store: to change a password there, the server asks for the one before. So this is about
a server that is started here, and no word to it: pipelines.tracking, where runs speak MLflow, has no use for it.
"""

import os
import sys

from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore


def main(database: str) -> None:
    store = SqlAlchemyStore()
    store.init_db(database)
    user, password = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    if store.has_user(user):
        store.update_user(user, password=password, is_admin=True)
    else:
        store.create_user(user, password, is_admin=True)


if __name__ == "__main__":
    main(sys.argv[1])
