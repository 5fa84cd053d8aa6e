"""Exports on the Hugging Face Hub: fetching and pushing them, with the package huggingface_hub.

It finds the user's token by itself (`hf auth login`, or HF_TOKEN); none is seen here.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

from djepa_jax.checkpoints.integrity import MANIFEST_NAME
from djepa_jax.runtime.errors import UserError
from djepa_jax.runtime.storage import reason

SCHEME = "hf://"
NAME = r"\w[\w.-]*/\w[\w.-]*"


class HubError(UserError, RuntimeError):
    """Something that the Hub did not give or take."""


def local(path: str | os.PathLike) -> str | os.PathLike:
    """A path as it is, or the folder of a copy of what `hf://USER/NAME[@REVISION]` names."""
    if not isinstance(path, str) or not path.startswith(SCHEME):
        return path
    parts = re.fullmatch(f"{SCHEME}({NAME})(?:@([^@]+))?", path)
    if parts is None:
        raise HubError(f'"{path}" is no address on the Hub; write hf://USER/NAME[@REVISION].')
    with _asking(path, "check the name, and for a private one your login (hf auth login)"):
        return _library().snapshot_download(parts[1], revision=parts[2])


def check_push(repo: str, overwrite: bool) -> None:
    """Raise HubError unless an export can be pushed to USER/NAME: new, empty, or to be replaced."""
    if re.fullmatch(NAME, repo) is None:
        raise HubError(f'--push="{repo}" is no name on the Hub; write --push=USER/NAME.')
    api = _library().HfApi()
    with _asking(f"--push={repo}", "log in with hf auth login, or set HF_TOKEN"):
        api.whoami()
        found = set(api.list_repo_files(repo) if api.repo_exists(repo) else ())
    found.discard(".gitattributes")
    if found and not (overwrite and MANIFEST_NAME in found):
        what = "is no export" if overwrite else f"holds {len(found)} files"
        raise HubError(
            f"--push={repo} exists and {what}; name another, or add --overwrite to replace an "
            "export."
        )


def push(folder: pathlib.Path, repo: str) -> None:
    """Make the repository, a private one if it is new, and let it hold this export alone."""
    api = _library().HfApi()
    with _asking(f"--push={repo}", f"the export is in {folder}; add --overwrite to try again"):
        api.create_repo(repo, private=True, exist_ok=True)
        message = f"Export {folder.name}"
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns="*"
        )


def _library():
    try:
        import huggingface_hub
    except ImportError as error:
        raise HubError(
            "the Hugging Face Hub needs the package huggingface_hub: pip install "
            '"djepa_jax[hub]", or pip install huggingface_hub.'
        ) from error
    return huggingface_hub


@contextlib.contextmanager
def _asking(what: str, remedy: str) -> Iterator[None]:
    """Make what the library or the Hub says one line."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # of httpx, of the library, of the system
        raise HubError(f"{what}: {reason(error).rstrip('.')}; {remedy}.") from error
