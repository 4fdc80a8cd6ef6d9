"""A server on loopback that speaks as much of the Hugging Face hub as a download needs: files of repositories by revision."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

ERRORS = {"RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404, "GatedRepo": 403}


class HubServer:
    """Repositories: name -> revision (branch, tag) -> folder. A revision's commit is a digest of its files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.requests: Counter[str] = Counter()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self, with_body=False)

            def do_GET(self):
                hub.answer(self, with_body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, with_body: bool) -> None:
        """Answer a request for a file."""
        owner, name, _, revision, *file = map(unquote, handler.path.lstrip("/").split("/"))
        repository, path = f"{owner}/{name}", "/".join(file)
        self.requests[path] += 1
        revisions = self.repositories.get(repository)
        if revisions is None:
            return self._refuse(handler, "RepoNotFound")
        if repository in self.gated:
            return self._refuse(handler, "GatedRepo")
        commits = {commit_of(folder): folder for folder in revisions.values()}
        folder = revisions.get(revision) or commits.get(revision)
        if folder is None:
            return self._refuse(handler, "RevisionNotFound")
        if not (folder / path).is_file():
            return self._refuse(handler, "EntryNotFound", commit_of(folder))
        body = (folder / path).read_bytes()
        handler.send_response(200)
        handler.send_header("X-Repo-Commit", commit_of(folder))
        handler.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if with_body:
            handler.wfile.write(body)
        return None

    def _refuse(self, handler: BaseHTTPRequestHandler, error: str, commit: str = "") -> None:
        handler.send_response(ERRORS[error])
        handler.send_header("X-Error-Code", error)
        if commit:
            handler.send_header("X-Repo-Commit", commit)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def commit_of(folder: Path) -> str:
    """Return 40 digits that stand for the files of a folder."""
    digest = hashlib.sha1()
    for path in sorted(folder.rglob("*")):
        digest.update(path.relative_to(folder).as_posix().encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


@contextmanager
def hub_server():
    """Yield a server, and stop it after the block."""
    server = HubServer()
    try:
        yield server
    finally:
        server.close()


def cache_snapshot(cache: Path, repository: str, folder: Path, revision: str = "main") -> Path:
    """Write the files of a folder into a cache as huggingface_hub documents its layout: refs, blobs, snapshots of links."""
    root, commit = cache / f"models--{repository.replace('/', '--')}", commit_of(folder)
    (root / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    (root / "blobs").mkdir(exist_ok=True)
    snapshot = root / "snapshots" / commit
    for path in (path for path in folder.rglob("*") if path.is_file()):
        blob, link = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest(), snapshot / path.relative_to(folder)
        blob.write_bytes(path.read_bytes())
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot
