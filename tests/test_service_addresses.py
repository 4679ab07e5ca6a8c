"""services.env: what a command takes from it, what stands over it, and what is wrong with a bad one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PROJECT, codecmill
from test_bad_images import POWERLESS

from flows.cli.services import free_port
from infra.services.configuration import configured
from infra.services.secrets import NAMES, secrets_of
from pipelines.doctor.s3_server import examine_s3
from pipelines.doctor.services_file import examine_services_file
from pipelines.errors import InputError
from pipelines.run_directory import Root
from pipelines.service_addresses import read_variables, use_services, write_services

ADDRESSES = {
    "PREFECT_API_URL": "http://127.0.0.1:1/api",
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:2",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:3",
}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """With services.env and secrets, and lines that are none of codecmill's business."""
    secrets = tmp_path / "services" / "secrets.env"
    secrets.parent.mkdir()
    secrets_of(
        secrets, {"CODECMILL_PREFECT_API_AUTH_STRING": "me:prefect", "CODECMILL_MLFLOW_TRACKING_PASSWORD": "mlflow"}
    )
    write_services(Root(tmp_path), ADDRESSES | {"LD_PRELOAD": "evil.so"}, secrets)
    return Root(tmp_path)


def used(root: Root, **environment: str) -> dict[str, str]:
    use_services(root, environment)
    return environment


def test_addresses_and_secrets_are_taken_and_nothing_else(root: Root):
    found = used(root)
    assert ADDRESSES.items() <= found.items()
    assert found["PREFECT_API_AUTH_STRING"] == "me:prefect"
    assert found["MLFLOW_TRACKING_PASSWORD"] == "mlflow"  # noqa: S105
    assert not {"LD_PRELOAD", "POSTGRES_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"} & set(found)
    assert "me:prefect" not in root.services_file.read_text()


def test_a_server_that_the_environment_names_gets_no_secret_of_ours(root: Root):
    found = used(root, PREFECT_API_URL="https://theirs/api", MLFLOW_TRACKING_URI="", AWS_PROFILE="work")
    assert found == {"PREFECT_API_URL": "https://theirs/api", "MLFLOW_TRACKING_URI": "", "AWS_PROFILE": "work"}


def test_a_secret_of_the_environment_stands_over_the_files(root: Root):
    assert used(root, PREFECT_API_AUTH_STRING="me:new")["PREFECT_API_AUTH_STRING"] == "me:new"


def test_without_the_secrets_there_are_addresses(root: Root):
    (root.path / "services/secrets.env").unlink()
    assert used(root) == ADDRESSES
    assert [each.state for each in examine_services_file(root)] == ["fault"]


def test_without_services_env_nothing_changes(tmp_path: Path):
    assert used(Root(tmp_path)) == {}


def test_a_command_goes_by_the_services_env_of_the_root_in_its_config_file(root: Root, tmp_path: Path):
    (tmp_path / "my.yaml").write_text(f"root: {root.path}\nname: x\ndata: {{images: nothing}}\n")
    root.services_file.write_text("PREFECT_API_URL\n")
    found = codecmill("run", "--config", str(tmp_path / "my.yaml"), cwd=tmp_path)
    assert found.returncode == 2
    assert f"Line 1 of {root.services_file} is not of the form NAME=value." in found.stderr


@pytest.mark.parametrize(
    ("more", "without"),
    [
        ("", "To work without it: PREFECT_API_URL= (empty), or remove "),
        (
            "MLFLOW_TRACKING_URI=http://127.0.0.1:2\n",
            "To work without the servers: PREFECT_API_URL= MLFLOW_TRACKING_URI= (empty), or remove ",
        ),
    ],
)
def test_a_run_says_at_once_that_the_server_of_services_env_is_down(root: Root, photos: Path, more: str, without: str):
    root.services_file.write_text(f"PREFECT_API_URL=http://127.0.0.1:{(port := free_port())}/api\n{more}")
    found = codecmill("run", "--root", str(root.path), "--name", "x", "--data.images", str(photos), cwd=root.path)
    assert found.returncode == 1
    begins = (
        f"codecmill: Prefect's server at http://127.0.0.1:{port}/api does not answer: [Errno 111] Connection refused."
    )
    assert found.stderr.startswith(begins)
    assert f"{without}{root.services_file}." in found.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe=1", "cannot be read"),
        (b"A=1\n" * 20_000, "is longer than"),
        (b"A B=1", "not of the form NAME=value"),
    ],
)
def test_what_is_no_services_env_is_named(content: bytes, said: str, root: Root):
    root.services_file.write_bytes(content)
    with pytest.raises(InputError, match=said):
        use_services(root, {})


def test_a_pipe_is_not_waited_for(root: Root):
    root.services_file.unlink()
    os.mkfifo(root.services_file)
    with pytest.raises(InputError, match="is no regular file"):
        use_services(root, {})


def test_secrets_are_drawn_once_and_for_the_owner_alone(tmp_path: Path):
    file = tmp_path / "secrets.env"
    first = secrets_of(file, {})
    assert file.stat().st_mode & 0o777 == 0o600
    assert set(first) == set(NAMES)
    assert len(set(first.values())) == len(first)
    assert all(len(first[name]) >= 16 for name in NAMES if name != "MLFLOW_TRACKING_USERNAME")
    assert secrets_of(file, {}) == first
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "POSTGRES" not in line))
    file.chmod(0o644)
    again = secrets_of(file, {"CODECMILL_AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": "a cloud's"})
    assert {name for name in NAMES if again[name] != first[name]} == {"POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID"}
    assert read_variables(file) == again
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("value", ["", "two words", 'quo"te', "newline\n", "é", "$HOME", "a,b", "~x", "x" * 201])
def test_a_secret_that_no_file_can_carry_is_refused_without_being_shown(value: str, tmp_path: Path):
    with pytest.raises(InputError, match="POSTGRES_PASSWORD cannot be used") as refused:
        secrets_of(tmp_path / "secrets.env", {"CODECMILL_POSTGRES_PASSWORD": value})
    assert not value or value not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_ports_are_those_of_the_environment_and_free():
    taken = free_port()
    assert configured({"CODECMILL_PREFECT_PORT": str(taken)}).prefect_api == f"http://127.0.0.1:{taken}/api"
    with pytest.raises(InputError, match="CODECMILL_S3_PORT is 'many', and no port"):
        configured({"CODECMILL_S3_PORT": "many"})
    with pytest.raises(InputError, match="would share a port"):
        configured({"CODECMILL_S3_PORT": str(taken), "CODECMILL_MLFLOW_PORT": str(taken)}, is_ours=False)


def test_the_doctor_sees_who_can_read_the_secrets(root: Root, monkeypatch: pytest.MonkeyPatch):
    for name, value in ADDRESSES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://theirs")
    file, secrets = examine_services_file(root)
    assert "the environment says otherwise for MLFLOW_TRACKING_URI" in file.text
    assert (file.state, secrets.state) == ("good", "good")
    (root.path / "services/secrets.env").chmod(0o640)
    assert [each.state for each in examine_services_file(root)] == ["good", "fault"]


def test_the_doctor_says_that_s3_is_down(monkeypatch: pytest.MonkeyPatch):
    address = f"http://127.0.0.1:{free_port()}"
    for name, value in (("ENDPOINT_URL_S3", address), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    (found,) = examine_s3()
    assert found.state == "fault"
    assert found.text.startswith(f"{address} cannot be used: Could not connect")


@pytest.mark.parametrize("inside", ["", "services", "services/logs"])
def test_a_file_in_the_way_of_the_services_is_one_sentence(inside: str, tmp_path: Path):
    in_the_way = tmp_path / "root" / inside
    in_the_way.parent.mkdir(parents=True, exist_ok=True)
    in_the_way.touch()
    found = services_refused(tmp_path / "root")
    assert found is not None
    assert found[1] == str(in_the_way if inside else in_the_way / "services")
    assert found[2] == "Not a directory. Choose another --root, or move away the file in its way."


@pytest.mark.parametrize("made", ["root", "root/services/.lock"])
def test_a_root_that_another_user_made_is_one_sentence_of_the_services(made: str, tmp_path: Path):
    services = tmp_path / "root" / "services"
    for folder in (services, services / "logs", services / "prefect", services / "objects"):
        folder.mkdir(parents=True)
    if made == "root":
        shutil.rmtree(services)
        (tmp_path / "root").chmod(0o500)
    else:
        (services / ".lock").touch(mode=0o400)
    found = services_refused(tmp_path / "root")
    (tmp_path / "root").chmod(0o700)
    assert found is not None
    assert found[1] == str(tmp_path / made if made != "root" else services)
    assert found[2] == "Permission denied. Choose another --root, or have whoever owns it let you in."


def services_refused(root: Path) -> re.Match[str] | None:
    """What `make services` says where it can use nothing below a root: the place, and the rest."""
    command = [*POWERLESS, sys.executable, "-m", "infra.services.run", "--root", str(root)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    return re.fullmatch(r"services: (.*) cannot be used: (.*)\n", done.stderr)
