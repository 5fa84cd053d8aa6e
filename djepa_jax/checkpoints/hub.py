"""Exports on the Hugging Face Hub. The package huggingface_hub finds the user's token by itself."""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator

from djepa_jax.checkpoints.integrity import MANIFEST_NAME, CheckpointError
from djepa_jax.runtime.storage import reason

SCHEME = "hf://"
NAME = r"\w[\w.-]*/\w[\w.-]*"


def local(path: str | os.PathLike) -> str | os.PathLike:
    """A path as it is, or the folder of a copy of what `hf://USER/NAME[@REVISION]` names."""
    if not isinstance(path, str) or not path.startswith(SCHEME):
        return path
    parts = re.fullmatch(f"{SCHEME}({NAME})(?:@([^@]+))?", path)
    if parts is None:
        raise CheckpointError(f'"{path}" is no address; write hf://USER/NAME[@REVISION].')
    with _asking(path, "check the name, and for a private one your login (hf auth login)") as hub:
        return hub.snapshot_download(parts[1], revision=parts[2])


def check_push(repo: str, overwrite: bool) -> None:
    """Raise CheckpointError unless USER/NAME is new, empty, or an export to be replaced."""
    if re.fullmatch(NAME, repo) is None:
        raise CheckpointError(f'--push="{repo}" is no name on the Hub; write --push=USER/NAME.')
    with _asking(f"--push={repo}", "log in with hf auth login, or set HF_TOKEN") as hub:
        api = hub.HfApi()
        api.whoami()
        found = set(api.list_repo_files(repo) if api.repo_exists(repo) else ())
    if found - {".gitattributes"} and not (overwrite and MANIFEST_NAME in found):
        raise CheckpointError(
            f"--push={repo} exists{' and is no export' if overwrite else ''}; name another, or add "
            "--overwrite to replace an export."
        )


def push(folder: pathlib.Path, repo: str) -> None:
    """Make the repository, a private one if it is new, and let it hold this export alone."""
    remedy = f"the export is in {folder}; to try again, add --overwrite"
    with _asking(f"--push={repo}", remedy) as hub:
        api, message = hub.HfApi(), f"Export {folder.name}"
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns="*"
        )


@contextlib.contextmanager
def _asking(what: str, remedy: str) -> Iterator:
    """The package; what it or the Hub says becomes one line."""
    try:
        import huggingface_hub

        yield huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f'{what} needs the package huggingface_hub: pip install "djepa_jax[hub]".'
        ) from error
    except Exception as error:  # of httpx, of the package, of the system
        raise CheckpointError(f"{what}: {reason(error).rstrip('.')}; {remedy}.") from error
