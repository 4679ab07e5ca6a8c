-- For compose.yaml: beside 'prefect', which the image makes. `make services` makes the same, see postgres.py.
CREATE DATABASE mlflow;
CREATE DATABASE mlflow_auth;
