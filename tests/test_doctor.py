"""What `codecmill doctor` finds: a sound machine, folders that cannot serve, servers that are down, old or closed.

Real servers are looked at where they run anyway: test_tracking (MLflow), test_deployment (Prefect).
"""

import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from prefect.settings import (
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_TLS_INSECURE_SKIP_VERIFY,
    temporary_settings,
)
from processes import PROJECT, codecmill

from flows.cli.services import free_port
from pipelines.doctor import Finding, machine, storage
from pipelines.doctor.machine import examine_machine
from pipelines.doctor.s3_server import examine_s3
from pipelines.doctor.servers import examine_mlflow, examine_prefect
from pipelines.doctor.storage import examine_storage, locks_of_other_hosts
from pipelines.run_directory import Root
from tasks.reporting import silence


@contextmanager
def answering(status: int, text: str, clock: str | None = None, certificate: Path | None = None) -> Iterator[str]:
    """A server on this machine that says the same to everything, with a `Date` of its own if one is given.

    With a certificate, and its key in the same file, it speaks TLS.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def date_time_string(self, timestamp: float | None = None) -> str:
            return clock or super().date_time_string(timestamp)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def faults(findings: Iterator[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.state == "fault"]


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_where_the_tests_run_all_is_well_and_nothing_is_left(tmp_path: Path):
    found = codecmill("doctor", "--root", str(tmp_path / "root"), "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    findings = json.loads(found.stdout)
    assert {"system", "packages", "ports", "processor", "root", "locks", "room"} <= {each["about"] for each in findings}
    assert not [each for each in findings if each["state"] == "fault"]
    assert list(tmp_path.iterdir()) == []


def test_a_configured_server_that_is_down_is_exit_code_1_and_its_remedy_is_said(tmp_path: Path):
    address = f"http://127.0.0.1:{free_port()}"
    found = codecmill("doctor", cwd=tmp_path, PREFECT_API_URL=f"{address}/api")
    assert found.returncode == 1
    assert f"✗ Prefect           {address}/api does not answer: [Errno 111] Connection refused" in found.stdout
    assert "Start it, or correct its address" in found.stdout
    assert found.stderr.startswith("codecmill: 1 of ")


def test_a_package_outside_of_what_works_is_named(monkeypatch: pytest.MonkeyPatch):
    wanted = ["torch<2", "pillow>=1", "no-such-package>=3", 'pytest<1; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    (found,) = faults(examine_machine())
    assert found.text == f"torch {metadata.version('torch')} is not <2; no-such-package is not installed"
    assert "requirements.lock" in found.remedy


def test_a_root_below_a_file_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    (found,) = faults(examine_storage(Root(tmp_path / "file" / "root")))
    assert found.about == "root"
    assert "Not a directory" in found.text


def test_a_root_below_a_closed_folder_cannot_be_written(tmp_path: Path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    # Root may look into every folder, but for the capabilities that let it.
    powerless = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    found = subprocess.run(
        [*powerless, sys.executable, "-m", "flows", "doctor", "--root", closed / "root"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    closed.chmod(0o700)
    assert f"{closed}/root cannot be written: Permission denied" in found.stdout, found.stderr
    assert found.returncode == 1


def test_little_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "LEAST_FREE", 2**60)
    (found,) = faults(examine_storage(Root(tmp_path)))
    assert found.about == "room"
    assert found.text.endswith("GiB free")


@pytest.mark.parametrize(
    ("status", "text", "expected"),
    [
        (200, '"3.8.0"', "is Prefect 3.8.0"),
        (200, "3.99.1", "is Prefect 3.99.1"),
        (200, '"3.7.9"', "is Prefect 3.7.9, and ours is"),
        (200, '"4.0.0"', "is Prefect 4.0.0, and ours is"),
        (200, "<html>", "says that its version is '<html>'"),
        (401, "", "refuses our credentials (401)"),
        (500, "", "/admin/version answers 500"),
    ],
)
def test_what_a_prefect_server_answers(status: int, text: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    with answering(status, text) as address:
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        first = next(examine_prefect())
    assert expected in first.text
    assert first.state == ("fault" if "ours is" in expected or status != 200 else "note" if "<" in text else "good")


def seen_of_s3(address: str, monkeypatch: pytest.MonkeyPatch) -> Finding:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("CODECMILL_STORE", raising=False)
    (found,) = examine_s3()
    return found


@pytest.mark.parametrize("text", ["<html>", '{"detail": "Not Found"}', "[1]", '[{"status": "ONLINE"}]'])
def test_an_address_that_leads_to_something_else_is_a_fault_and_no_traceback(
    text: str, monkeypatch: pytest.MonkeyPatch
):
    with answering(200, text) as address:
        monkeypatch.setenv("PREFECT_API_URL", address)
        *_, found = examine_prefect()
        s3 = seen_of_s3(address, monkeypatch)
    assert (found.state, found.text) == ("fault", f"{address} answers, but not as Prefect's server does")
    assert s3.state == "fault"


@pytest.mark.parametrize(
    ("status", "code", "state", "text"),
    [
        (403, "AccessDenied", "note", "does not let our credentials list its buckets"),
        (403, "InvalidAccessKeyId", "fault", "refuses our credentials (403, InvalidAccessKeyId)"),
        (500, "InternalError", "fault", "fails (500, InternalError)"),
    ],
)
def test_what_an_s3_server_refuses(status: int, code: str, state: str, text: str, monkeypatch: pytest.MonkeyPatch):
    with answering(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>") as address:
        found = seen_of_s3(address, monkeypatch)
    assert found.state == state
    assert text in found.text


def test_a_root_that_is_a_link_is_looked_at_where_it_leads(tmp_path: Path):
    (tmp_path / "mounted").mkdir()
    (tmp_path / "root").symlink_to("mounted")
    mounts = f"60 22 0:50 / {tmp_path}/mounted rw - nfs server:/x rw,nolock\n"
    assert [each.state for each in locks_of_other_hosts(tmp_path / "root", mounts)] == ["note"]


def test_a_driver_whose_gpus_are_hidden_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (driver := tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Kernel Module  580.65.06")
    monkeypatch.setattr(machine, "DRIVER", driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine._no_gpu("13.0")
    assert (found.state, found.text) == ("note", "there is a driver, but no GPU is visible here")


def test_a_worker_that_lacks_is_to_be_one_whose_flow_runs_save(monkeypatch: pytest.MonkeyPatch):
    """Prefect's own worker kills its flow runs where it is asked to end."""
    with answering(200, "[]") as address:
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        *_, found = examine_prefect()
    assert (found.about, found.state) == ("workers", "note")
    assert found.remedy == "For scheduled runs: python -m infra.services.worker --pool codecmill"


@pytest.mark.parametrize("variable", ["PREFECT_API_URL", "MLFLOW_TRACKING_URI"])
def test_an_address_that_is_none_is_a_fault_as_others_and_shows_no_password(variable: str, tmp_path: Path):
    for address, shown in (("http://[", "http://["), ("http://me:secret@[", "http://***@[")):
        found = codecmill("doctor", "--root", str(tmp_path), cwd=tmp_path, **{variable: address})
        assert f"{shown} does not answer: Invalid IPv6 URL" in " ".join(found.stdout.split()), found.stdout
        assert (found.returncode, "secret" in found.stdout + found.stderr) == (1, False)


def test_a_servers_clock_that_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    ours = metadata.version("mlflow")
    with answering(200, ours, clock=formatdate(0, usegmt=True)) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        (found,) = faults(examine_mlflow(Root(tmp_path)))
    assert found.about == "clock of MLflow"
    assert "behind this machine's" in found.text


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of 127.0.0.1, signed by nobody else, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "us")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number()).not_valid_before(now)
    address = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    signed = builder.not_valid_after(now + timedelta(days=1)).add_extension(address, critical=False).sign(key, SHA256())
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (file := tmp_path / "certificate.pem").write_bytes(signed.public_bytes(Encoding.PEM) + key.private_bytes(*form))
    return file


@pytest.mark.parametrize(
    ("server", "trusts", "all_are_trusted"),
    [
        ("Prefect", "PREFECT_API_SSL_CERT_FILE", "PREFECT_API_TLS_INSECURE_SKIP_VERIFY"),
        ("MLflow", "MLFLOW_TRACKING_SERVER_CERT_PATH", "MLFLOW_TRACKING_INSECURE_TLS"),
    ],
)
def test_a_certificate_is_believed_where_the_servers_own_client_believes_it(
    server: str, trusts: str, all_are_trusted: str, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = server.lower()

    def first() -> str:
        (found, *_) = examine_prefect() if server == "Prefect" else examine_mlflow(Root(tmp_path))
        return found.text

    with answering(200, metadata.version(package), certificate=certificate) as address:
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert "CERTIFICATE_VERIFY_FAILED" in first()
        for name, value in ((trusts, str(certificate)), (all_are_trusted, "true")):
            with monkeypatch.context() as setting:
                setting.setenv(name, value)
                assert f"is {server} {metadata.version(package)}" in first()


def test_a_file_of_certificates_that_is_not_there_is_named_where_one_is_needed(
    certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(name, "/nowhere/bundle.pem")
    unread = "the certificates to believe cannot be read from /nowhere/bundle.pem: No such file"
    with answering(200, version := metadata.version("mlflow")) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("PREFECT_API_URL", f"{address}/api")
        assert f"is MLflow {version}" in next(examine_mlflow(Root(tmp_path))).text
        assert unread in next(examine_prefect()).text, "its client reads them for plain http as well"
    with answering(200, version, certificate=certificate) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        said = next(examine_mlflow(Root(tmp_path))).text
    assert unread in said


def test_a_task_hears_a_server_whose_certificate_prefect_believes(certificate: Path):
    with answering(200, "true", certificate=certificate) as address:
        assert "CERTIFICATE_VERIFY_FAILED" in str(silence(address))
        with temporary_settings({PREFECT_API_SSL_CERT_FILE: str(certificate)}):
            assert silence(address) is None
        with temporary_settings({PREFECT_API_TLS_INSECURE_SKIP_VERIFY: True}):
            assert silence(address) is None
    assert "refused" in str(silence(address)), "it is gone"


def test_a_server_behind_a_proxy_answers(monkeypatch: pytest.MonkeyPatch):
    with answering(200, metadata.version("prefect")) as proxy:
        monkeypatch.setenv("http_proxy", proxy)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
        assert "is Prefect" in next(examine_prefect()).text


def test_a_server_that_never_answers_is_given_up_and_its_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("pipelines.doctor.servers.TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{silent.getsockname()[1]}")
        (found,) = faults(examine_mlflow(Root(tmp_path)))
    assert "http://me:***@127.0.0.1" in found.text
    assert "timed out" in found.text


MOUNTS = """\
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
60 22 0:50 / /shared/with\\040space rw - nfs4 server:/a rw,vers=4.2,local_lock=none
61 22 0:51 / /old rw - nfs server:/b rw,vers=3,nolock,local_lock=all
62 22 0:52 / /fast rw - lustre mgs:/c rw,localflock
63 22 0:53 / /good rw - lustre mgs:/c rw,flock
"""


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("/home/me", None),
        ("/shared/with space/root", None),
        ("/old/root", "are this host's alone on nfs, mounted with local_lock=all, nolock"),
        ("/older/root", None),
        ("/fast", "are this host's alone on lustre"),
        ("/good/root", None),
    ],
)
def test_locks_that_other_hosts_do_not_see_are_noted(folder: str, text: str | None):
    found = [finding.text for finding in locks_of_other_hosts(Path(folder), MOUNTS)]
    assert found == ([] if text is None else [text])
