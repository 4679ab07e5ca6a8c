"""An S3 server on this machine for tests, and a proxy before it that breaks what it is told to break."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from flows.cli.services import free_port
from pipelines import storage
from pipelines.run_directory import RunDirectory

PROJECT = Path(__file__).parents[1]
BUCKET = "mill"
AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret-of-nobody",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def s3_server(port: int | None = None) -> Iterator[str]:
    """The address of an S3 server (moto's) with an empty bucket, in a process of its own."""
    port = port or free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
    )
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("PUT", f"/{BUCKET}")
        assert connection.getresponse().status == 200
        connection.close()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


Kind = Literal["403", "500", "503", "stall", "half", "trickle", "flip", "close", "lost", "page"]
"""`lost`: the request is carried out, and its answer lost; `page`: a web page in place of one."""


@dataclass
class Fault:
    """What happens to the requests that `matches` (method, path) says, the first `times` of them."""

    kind: Kind
    matches: Callable[[str, str], bool]
    times: int = 10**9
    met: int = 0


@dataclass
class Proxy:
    """Passes requests on to a server, but for those that are to meet a fault."""

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    address: str = ""
    takes_conditions: bool = True
    one_condition: threading.Lock = field(default_factory=threading.Lock)
    """S3 looks at a condition and writes in one step; moto in two."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def break_(self, kind: Kind, method: str, part: str, times: int = 10**9) -> Fault:
        """Have requests of a method whose path contains `part` meet a fault."""
        fault = Fault(kind, lambda asked, path: asked == method and part in path, times)
        self.faults.append(fault)
        return fault

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.met < fault.times and fault.matches(method, path):
                    fault.met += 1
                    return fault
        return None

    def count(self, method: str, part: str) -> int:
        return sum(asked == method and part in path for asked, path in self.requests)


@contextmanager
def proxy_to(upstream: str) -> Iterator[Proxy]:
    """A proxy before a server; `Proxy.address` is where it listens."""
    proxy = Proxy(upstream)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self._body()
            fault = proxy.fault_of(self.command, self.path)
            if fault and fault.kind in ("403", "500", "503"):
                self.send_response(int(fault.kind))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault and fault.kind == "page":
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", "13")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(b"<html></html>")
                return
            if fault and fault.kind == "close":
                self.close_connection = True
                return
            if fault and fault.kind == "stall":
                time.sleep(3600)
            if fault and fault.kind == "flip" and body:
                body = bytes([body[0] ^ 1]) + body[1:]
            status, headers, content = self._passed_on(body)
            if fault and fault.kind == "lost":
                self.close_connection = True
                return
            if fault and fault.kind == "flip" and content:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = {name.lower(): value for name, value in headers}.get("content-length", str(len(content)))
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault and fault.kind == "half":
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            elif fault and fault.kind == "trickle":
                for byte in content:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.1)
            else:
                self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Expect", "").lower() == "100-continue":
                pass  # the standard library has answered it
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(urlsplit(proxy.upstream).netloc, timeout=60)
            conditional = self.command == "PUT" and ("If-Match" in self.headers or "If-None-Match" in self.headers)
            try:
                left = {"connection", "expect"} | (set() if proxy.takes_conditions else {"if-match", "if-none-match"})
                headers = {name: value for name, value in self.headers.items() if name.lower() not in left}
                with proxy.one_condition if conditional else nullcontext():
                    connection.request(self.command, self.path, body=body or None, headers=headers)
                    answer = connection.getresponse()
                    return answer.status, answer.getheaders(), answer.read()
            except OSError:
                return 503, [], b""
            finally:
                connection.close()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

        def log_message(self, format: str, *args: Any) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            return  # a client that has given up

    server = Server(("127.0.0.1", 0), Handler)
    proxy.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


def the_store() -> storage.Store:
    """The store that the environment names."""
    url = storage.store_url()
    assert url is not None
    return storage.open_store(url)


def in_a_process(script: str, directory: RunDirectory, stderr: int | None = None) -> "subprocess.Popen[str]":
    """A script that works on a run, in a process of its own, which can be killed; its output can be read."""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(directory.path)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )
