"""A stand-in for the Hugging Face Hub, as far as pushing and fetching a model goes, on this
machine; the library huggingface_hub talks to it when HF_ENDPOINT names it.
"""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse

TOKEN = "hf_secret"
PREFIX = "/api/models/"


class HubServer(http.server.ThreadingHTTPServer):
    """Repositories with one branch whose files are kept in memory.

    Attributes:
        repos: name -> files by path.
        private: the names of private ones.
        seen: "METHOD path" of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.seen: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


def _revision(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        path = urllib.parse.urlsplit(self.path).path
        if path == "/api/whoami-v2":
            return self._answer(200, {"type": "user", "name": "user", "orgs": []})
        user, name, *rest = urllib.parse.unquote(path.removeprefix(PREFIX).strip("/")).split("/")
        files = self.server.repos.get(f"{user}/{name}")
        if files is None:
            return self._answer(404, {"error": "missing"}, {"X-Error-Code": "RepoNotFound"})
        if path.startswith(PREFIX) and rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": "0"}
                for name, data in files.items()
            ]
            return self._answer(200, entries)
        if path.startswith(PREFIX):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": f"{user}/{name}", "sha": _revision(files), "siblings": siblings}
            return self._answer(200, info)
        data = files.get("/".join(rest[2:]))  # after resolve/REVISION
        if data is None:
            return self._answer(404, {"error": "missing"}, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha1(data).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": _revision(files)}
        return self._answer(200, data, headers)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urllib.parse.urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            if repo in self.server.repos:
                return self._answer(409, {"url": f"{self.server.endpoint}/{repo}"})
            self.server.repos[repo] = {".gitattributes": b""}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.server.private.add(repo)
            return self._answer(200, {"url": f"{self.server.endpoint}/{repo}"})
        user, name, action, _ = path.removeprefix(PREFIX).split("/")
        files = self.server.repos[f"{user}/{name}"]
        if action == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = _revision(files)
        url = f"{self.server.endpoint}/{user}/{name}/commit/{oid}"
        return self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def _answer(self, status: int, content, headers=None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
