"""Local servers for tests of remote shards: an HTTP server with faults on demand, and an S3 server (moto)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("fail", "cut", "short", "hang", "corrupt", "drop")


class RangeServer:
    """Serve a folder over HTTP with byte ranges, and count requests and bytes per file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.sent = folder, Counter(), Counter()
        self.ranges, self._faults, self._lock = True, [], threading.Lock()
        self._stopped = threading.Event()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                server.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def break_next(self, count: int, fault: str, suffix: str = ".tar") -> None:
        """Add ``fault`` (one of FAULTS) to the next ``count`` responses for files that end in ``suffix``."""
        assert fault in FAULTS
        with self._lock:
            self._faults += [(fault, suffix)] * count

    def answer(self, handler: SimpleHTTPRequestHandler) -> None:
        """Answer a GET request, with the next fault if it matches."""
        path = self.folder / handler.path.lstrip("/")
        if path.is_dir():
            SimpleHTTPRequestHandler.do_GET(self._listing(handler))
            return
        with self._lock:
            self.requests[path.name] += 1
            matches = bool(self._faults) and path.name.endswith(self._faults[0][1])
            fault = self._faults.pop(0)[0] if matches else None
        if not path.is_file() or fault == "fail":
            handler.send_error(503 if path.is_file() else 404)
            return
        if fault == "hang":
            self._stopped.wait(30)
        if fault in ("hang", "drop"):
            handler.close_connection = True
            return
        self._send(handler, path, fault)

    def _listing(self, handler: SimpleHTTPRequestHandler) -> SimpleHTTPRequestHandler:
        handler.directory = str(self.folder)
        return handler

    def _send(self, handler: SimpleHTTPRequestHandler, path: Path, fault: str | None) -> None:
        body, byte_range = path.read_bytes(), handler.headers.get("Range")
        total, first = len(body), 0
        if byte_range and self.ranges:
            start, _, stop = byte_range.removeprefix("bytes=").partition("-")
            first = int(start)
            if first >= total:
                handler.send_error(416)
                return
            body = body[first : int(stop) + 1 if stop else total]
        handler.send_response(206 if byte_range and self.ranges else 200)
        if byte_range and self.ranges:
            handler.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
        if fault == "short":
            body = body[: len(body) // 2]  # as a proxy that truncates the body and its declared length
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if fault == "cut":
            body, handler.close_connection = body[: len(body) // 2], True
        if fault == "corrupt":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0x10]) + body[middle + 1 :]
        handler.wfile.write(body)
        with self._lock:
            self.sent[path.name] += len(body)

    def stop(self) -> None:
        """Stop the server and end hanging responses."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def range_server(folder: Path):
    """Yield a running RangeServer."""
    server = RangeServer(folder)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def s3_server(log: Path):
    """Run moto's S3 server in a process of its own. Yield the environment variables that s3fs needs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, **environment})
    try:
        limit = time.monotonic() + 60
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, "the S3 server did not start"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield environment
    finally:
        process.terminate()
        process.wait()
