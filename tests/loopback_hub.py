"""A Hub of one process: serves folders to the real huggingface_hub client from 127.0.0.1. Reading only."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


@contextmanager
def serve(repos: Mapping[str, Mapping[str, Path]]) -> Iterator[str]:
    """Serves `{repository id: {revision: folder}}` and yields the endpoint, a value for `HF_ENDPOINT`.

    A revision's commit is a hash of its name, so that `main` and others are told apart in the client's cache.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repos))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def commit_of(revision: str) -> str:
    """The commit that a revision's name stands for; a commit stands for itself."""
    is_commit = len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)
    return revision if is_commit else hashlib.sha1(revision.encode()).hexdigest()


def _handler(repos: Mapping[str, Mapping[str, Path]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            parts = unquote(self.path.split("?")[0]).strip("/").split("/")
            if parts[:2] == ["api", "models"] and len(parts) >= 4:  # api/models/{id}[/revision/{rev}]
                repo, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
                folder = self._folder(repo, revision)
                if folder is not None:
                    self._send_model_info(repo, revision, folder, with_body=with_body)
            elif len(parts) >= 5 and parts[2] == "resolve":  # {id}/resolve/{rev}/{file}
                folder = self._folder("/".join(parts[:2]), parts[3])
                if folder is not None:
                    self._send_file(folder / "/".join(parts[4:]), commit_of(parts[3]), with_body=with_body)
            else:
                self._send_error("EntryNotFound")

        def _folder(self, repo: str, revision: str) -> Path | None:
            """The folder of a revision; None after an error was sent."""
            if repo not in repos:
                self._send_error("RepoNotFound")
                return None
            for name, folder in repos[repo].items():
                if revision in (name, commit_of(name)):
                    return folder
            self._send_error("RevisionNotFound")
            return None

        def _send_model_info(self, repo: str, revision: str, folder: Path, *, with_body: bool) -> None:
            files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            info = {"id": repo, "sha": commit_of(revision), "siblings": [{"rfilename": name} for name in files]}
            self._send(json.dumps(info).encode(), {"Content-Type": "application/json"}, with_body=with_body)

        def _send_file(self, path: Path, commit: str, *, with_body: bool) -> None:
            if not path.is_file():
                self._send_error("EntryNotFound", {"X-Repo-Commit": commit})
                return
            content = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
            self._send(content, headers, with_body=with_body)

        def _send_error(self, code: str, headers: Mapping[str, str] | None = None) -> None:
            self._send(b"", {"X-Error-Code": code, **(headers or {})}, with_body=False, status=404)

        def _send(self, body: bytes, headers: Mapping[str, str], *, with_body: bool, status: int = 200) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    return Handler
