"""A Hub of one process: what the real huggingface_hub client needs of the Hub, served from 127.0.0.1 and from memory.

Repositories with branches and commits, visibility and tokens, uploads ("regular" mode only), pull requests, downloads
with ranges; and, on demand, answers that fail and connections that break.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]


@contextmanager
def serve(repos: Mapping[str, Mapping[str, Path]]) -> Iterator[str]:
    """Serves `{repository id: {revision: folder}}` and yields the endpoint, a value for `HF_ENDPOINT`."""
    with loopback_hub() as hub:
        for repo_id, revisions in repos.items():
            repo = hub.create(repo_id)
            for revision, folder in revisions.items():
                repo.commit(revision, files_of(folder))
        yield hub.endpoint


@contextmanager
def loopback_hub(**tokens: str) -> Iterator[LoopbackHub]:
    """Yields a running Hub without repositories. `tokens` are its users' tokens: `alice="hf_alice"`."""
    hub = LoopbackHub({token: user for user, token in tokens.items()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@dataclass
class Repo:
    """Commits by hash, and branches (and pull requests, as `refs/pr/N`) as names for them."""

    private: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def find(self, revision: str) -> str | None:
        """The hash that a revision stands for; a full hash stands for itself."""
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> Files:
        return self.commits[self.find(revision)]

    def commit(self, branch: str, changes: Mapping[str, bytes | None], message: str = "") -> str:
        """Adds a commit to a branch; None deletes a file."""
        files = {**self.commits.get(self.branches.get(branch, ""), {}), **changes}
        content = {name: data for name, data in files.items() if data is not None}
        parts = [branch, str(len(self.commits)), *(f"{name} {_blob(data)}" for name, data in sorted(content.items()))]
        sha = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = content, sha
        self.messages.append(message)
        return sha


@dataclass
class Fault:
    part: str
    times: int
    status: int | None  # None: half of the body, and the connection ends
    headers: Mapping[str, str]
    method: str | None


@dataclass
class LoopbackHub:
    """What the server knows; a test may look at it and change it."""

    tokens: dict[str, str]
    endpoint: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    faults: list[Fault] = field(default_factory=list)

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": b""}, "initial commit")
        return repo

    def fail(
        self, part: str, status: int, *, times: int = 1, method: str | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        """Answers the next requests with `part` in their path with an error."""
        self.faults.append(Fault(part, times, status, headers, method))

    def cut(self, part: str, *, times: int = 1) -> None:
        """Sends half of what the next downloads with `part` in their path ask for, and closes the connection."""
        self.faults.append(Fault(part, times, None, {}, "GET"))

    def take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.part in path and fault.method in (None, method):
                fault.times -= 1
                return fault
        return None

    def downloads(self, name: str) -> int:
        """How often the content of a file was asked for."""
        return sum(method == "GET" and "/resolve/" in path and path.endswith(name) for method, path, _ in self.requests)


def _blob(content: bytes) -> str:
    """The hash by which git, and so the client, knows a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _RefusedError(Exception):
    """An answer with an error, as the Hub sends it."""

    def __init__(self, status: int, code: str | None = None, message: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            url = urlsplit(self.path)
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append((self.command, unquote(url.path), self.headers.get("Range")))
            parts = [unquote(part) for part in url.path.strip("/").split("/")]  # a branch may have a slash in its name
            fault = hub.take_fault(self.command, url.path)
            try:
                if fault is not None and fault.status is not None:
                    raise _RefusedError(fault.status, message="Something went wrong", **fault.headers)
                if self.command == "POST":
                    self._send_json(self._post(parts, parse_qs(url.query), content))
                elif parts[:2] == ["api", "models"]:
                    self._send_json(self._api(parts[2:]))
                else:
                    self._send_file(parts, cut=fault is not None)
            except _RefusedError as refusal:
                body = json.dumps({"error": str(refusal)}).encode()
                self._send(body, {"Content-Type": "application/json", **refusal.headers}, refusal.status)

        # who asks, and what may they do

        def _user(self) -> str | None:
            header = self.headers.get("Authorization")
            if header is None:
                return None
            if header.removeprefix("Bearer ") not in hub.tokens:
                raise _RefusedError(401, message="Invalid credentials in Authorization header")
            return hub.tokens[header.removeprefix("Bearer ")]

        def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
            user, repo = self._user(), hub.repos.get(repo_id)
            owner = repo_id.split("/")[0]
            if repo is None or (repo.private and user != owner):
                if user is None:  # the Hub does not tell strangers which repositories exist
                    raise _RefusedError(401, "RepoNotFound", "Invalid username or password.")
                raise _RefusedError(404, "RepoNotFound", "Repository not found")
            if write and user is None:
                raise _RefusedError(401, message="Invalid username or password.")
            if write and user != owner:
                raise _RefusedError(403, message=f"You don't have the rights to write to {repo_id}")
            return repo

        @staticmethod
        def _commit(repo: Repo, revision: str) -> str:
            sha = repo.find(revision)
            if sha is None:
                raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return sha

        # answers

        def _post(self, parts: list[str], query: dict[str, list[str]], content: bytes) -> object:
            if parts == ["api", "repos", "create"]:
                return self._create_repo(json.loads(content))
            if parts == ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            if parts[:2] != ["api", "models"] or len(parts) != 6:
                raise _RefusedError(404, "EntryNotFound", "Not found")
            repo_id, action, revision = "/".join(parts[2:4]), parts[4], parts[5]
            is_pull = query.get("create_pr") == ["1"]
            repo = self._repo(repo_id, write=not is_pull)
            if action == "branch":
                if revision in repo.branches:
                    raise _RefusedError(409, message="Reference already exists")
                start = json.loads(content or b"{}").get("startingPoint", "main")
                repo.branches[revision] = self._commit(repo, start)
                return {}
            sha = self._commit(repo, revision)
            if action == "preupload":
                present = repo.commits[sha]
                return {"files": [_upload_mode(entry["path"], present) for entry in json.loads(content)["files"]]}
            if action == "commit":
                return self._add_commit(repo_id, repo, revision, content, is_pull)
            raise _RefusedError(404, "EntryNotFound", "Not found")

        def _create_repo(self, asked: Mapping[str, str | bool | None]) -> object:
            user = self._user()
            if user is None:
                raise _RefusedError(401, message="Invalid username or password.")
            owner = asked.get("organization") or user
            repo_id = f"{owner}/{asked['name']}"
            if owner != user:
                raise _RefusedError(403, message=f"You don't have the rights to create a model under {owner}")
            if repo_id in hub.repos:
                # the client reads the id from the answer, although it is an error
                body = json.dumps({"error": "You already created this model repo", "url": f"{hub.endpoint}/{repo_id}"})
                self._send(body.encode(), {"Content-Type": "application/json"}, 409)
                return None
            # older clients say `private`, newer ones `visibility`
            hub.create(repo_id, private=asked.get("private") is True or asked.get("visibility") == "private")
            return {"url": f"{hub.endpoint}/{repo_id}"}

        @staticmethod
        def _add_commit(repo_id: str, repo: Repo, revision: str, content: bytes, is_pull: bool) -> object:
            changes, message = {}, ""
            for item in map(json.loads, content.splitlines()):
                value = item["value"]
                if item["key"] == "header":
                    message = value["summary"]
                elif item["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "deletedFile":
                    changes[value["path"]] = None
                else:
                    raise _RefusedError(400, message=f"{item['key']} is more than this Hub can do")
            answer = {}
            if is_pull:
                number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
                start, revision = repo.find(revision), f"refs/pr/{number}"
                repo.branches[revision] = start
                answer["pullRequestUrl"] = f"{hub.endpoint}/{repo_id}/discussions/{number}"
            sha = repo.commit(revision, changes, message)
            return {"commitUrl": f"{hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha, **answer}

        def _api(self, parts: list[str]) -> object:  # {id}[/revision/{rev} | /tree/{rev} | /refs]
            repo = self._repo("/".join(parts[:2]))
            action = parts[2] if len(parts) > 2 else "revision"
            if action == "refs":
                names = [name for name in repo.branches if not name.startswith("refs/")]
                branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": repo.branches[n]} for n in names]
                return {"branches": branches, "converts": [], "tags": []}
            sha = self._commit(repo, parts[3] if len(parts) > 3 else "main")
            files = repo.commits[sha]
            if action == "tree":
                return [{"type": "file", "path": n, "oid": _blob(c), "size": len(c)} for n, c in sorted(files.items())]
            siblings = [{"rfilename": name, "size": len(content)} for name, content in sorted(files.items())]
            return {"id": "/".join(parts[:2]), "sha": sha, "private": repo.private, "siblings": siblings}

        def _send_file(self, parts: list[str], *, cut: bool) -> None:  # {id}/resolve/{rev}/{file}
            if len(parts) < 5 or parts[2] != "resolve":
                raise _RefusedError(404, "EntryNotFound", "Not found")
            repo = self._repo("/".join(parts[:2]))
            sha = self._commit(repo, parts[3])
            content = repo.commits[sha].get("/".join(parts[4:]))
            if content is None:
                raise _RefusedError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": sha})
            headers = {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
            asked, status = self.headers.get("Range"), 200
            if asked is not None:
                start = int(asked.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                content, status = content[start:], 206
            self._send(content, headers, status, cut=cut)

        def _send_json(self, answer: object) -> None:
            if answer is not None:
                self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _send(self, body: bytes, headers: Mapping[str, str], status: int = 200, *, cut: bool = False) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

    return Handler


def _upload_mode(path: str, present: Files) -> dict[str, object]:
    oid = _blob(present[path]) if path in present else None
    return {"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid}
