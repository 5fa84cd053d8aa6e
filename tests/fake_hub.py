"""In place of the package huggingface_hub: the calls that are made of it, with its signatures, on
repositories in memory.
"""

import hashlib
import pathlib
import types


class FakeHub(types.ModuleType):
    """The module; its `repos` and `private` are those of `hub_server.HubServer`, and `HfApi()` is
    itself.
    """

    def __init__(self, cache: pathlib.Path):
        super().__init__("huggingface_hub")
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.logged_in = True
        self._cache = cache

    def HfApi(self):
        return self

    def _files(self, repo_id: str) -> dict[str, bytes]:
        if repo_id not in self.repos:
            raise OSError(f"404 Client Error.\n\nRepository Not Found: {repo_id}.")
        return self.repos[repo_id]

    def whoami(self) -> dict:
        if not self.logged_in:
            raise OSError("Token is required, but no token found.")
        return {"name": "user"}

    def repo_exists(self, repo_id: str) -> bool:
        return repo_id in self.repos

    def list_repo_files(self, repo_id: str) -> list[str]:
        return list(self._files(repo_id))

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok or repo_id not in self.repos
        if private and repo_id not in self.repos:
            self.private.add(repo_id)
        self.repos.setdefault(repo_id, {".gitattributes": b""})

    def upload_folder(
        self, *, repo_id: str, folder_path, commit_message: str, delete_patterns: str
    ) -> None:
        assert commit_message and delete_patterns == "*"
        files, folder = self._files(repo_id), pathlib.Path(folder_path)
        for name in files.keys() - {".gitattributes"}:
            del files[name]
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def snapshot_download(self, repo_id: str, *, revision: str | None = None) -> str:
        files = self._files(repo_id)
        if revision not in (None, "main"):
            raise OSError(f"404 Client Error.\n\nRevision Not Found: {revision}.")
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        for name, data in files.items():
            path = self._cache / digest / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return str(self._cache / digest)
