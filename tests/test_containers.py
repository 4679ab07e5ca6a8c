"""compose.yaml and the Kubernetes manifests: sound by their schemas, closed to others, one with `make services`."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from infra.services.configuration import DATABASES, DEFAULTS
from infra.services.pin_images import pinned
from infra.services.secrets import NAMES
from pipelines.service_addresses import read_variables

INFRA = Path(__file__).parents[1] / "infra"
COMPOSE = INFRA / "compose.yaml"
MANIFESTS = sorted((INFRA / "kubernetes").glob("*.yaml"))
VARIABLE = re.compile(r"\$\{(\w+)(:[?-])?")


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


def objects(file: Path) -> list[dict[str, Any]]:
    """The objects of a manifest, of a JobSet, which no package has a schema of, the jobs in it."""
    found = []
    for each in documents(file):
        jobs = each["spec"]["replicatedJobs"] if each["kind"] == "JobSet" else []
        found += [
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
            for job in jobs
        ] or [each]
    return found


@pytest.mark.parametrize("file", sorted(INFRA.glob("compose*.yaml")), ids=lambda file: file.name)
def test_compose_files_are_sound(file: Path):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_manifests_are_sound(file: Path):
    for each in objects(file):
        kubernetes_validate.validate(each, "1.33", strict=True)


def test_each_container_serves_this_machine_alone_and_is_looked_after():
    (compose,) = documents(COMPOSE)
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert service["restart"] == "no" or "healthcheck" in service, name
        assert re.fullmatch(r"[\w/]+:\d+\.\d+[\w.-]*(@sha256:\w{64})?", service["image"]), name
        # PostgreSQL's image leaves root by itself; the bucket's folder is handed over by it.
        assert service.get("user") == "10001:10001" or name in ("postgres", "bucket"), name
    assert re.search(r"^FROM python:3\.\d+\.\d+-", (INFRA / "Dockerfile").read_text(), re.MULTILINE)


def test_the_servers_of_compose_tell_figures_as_those_of_make_services():
    (compose,) = documents(COMPOSE)
    prefect, mlflow = compose["services"]["prefect"], compose["services"]["mlflow"]
    assert prefect["environment"]["PREFECT_SERVER_METRICS_ENABLED"] == "true"
    assert "--expose-prometheus" in mlflow["command"]


def test_compose_takes_its_secrets_and_ports_from_the_files_of_make_services():
    used = dict(VARIABLE.findall(COMPOSE.read_text()))
    needed = {name for name, mark in used.items() if mark == ":?"}
    assert needed == set(NAMES) | set(read_variables(DEFAULTS)), "a secret that is missing is an error"
    made = {"prefect", *re.findall(r"CREATE DATABASE (\w+)", (INFRA / "services/databases.sql").read_text())}
    assert made == set(DATABASES)


def pods() -> list[tuple[str, dict[str, Any]]]:
    found = [each for file in MANIFESTS for each in objects(file)]
    return [
        (each["metadata"]["name"], each["spec"]["template"]["spec"])
        for each in found
        if "template" in each.get("spec", {})
    ]


@pytest.mark.parametrize(("name", "pod"), pods(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_are_not_root_and_have_the_secrets_of_a_worker_alone(name: str, pod: dict[str, Any]):
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    (container,) = pod["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    keys = {each["valueFrom"]["secretKeyRef"]["key"] for each in container["env"] if "secretKeyRef" in str(each)}
    of_a_worker = set(NAMES) - {"POSTGRES_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert keys == (set() if name in ("meeting", "hosts") else of_a_worker)


def test_digests_go_behind_tags_and_replace_those_of_before():
    new, old = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
    text = (
        "FROM python:3.11\n    image: postgres:17.6\n"
        f"    image: rclone/rclone:1.75@{old}\n        - image: codecmill:0.1\n"
        "          image: registry.example.org/codecmill:0.1.0\n"
    )
    asked: list[str] = []
    found = pinned(text, lambda image: asked.append(image) or new)
    assert asked == ["python:3.11", "postgres:17.6", "rclone/rclone:1.75"]
    assert found == (
        f"FROM python:3.11@{new}\n    image: postgres:17.6@{new}\n"
        f"    image: rclone/rclone:1.75@{new}\n        - image: codecmill:0.1\n"
        "          image: registry.example.org/codecmill:0.1.0\n"
    )
