"""Which program runs: versions of packages, and the commit of a checkout."""

import pathlib
import platform

import flax
import jax
import jaxlib

CHECKOUT = pathlib.Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    own = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    return own | {"python": platform.python_version()}


def commit() -> str:
    """Of the checkout that runs; empty where it is not known. Files may differ from it."""
    git = CHECKOUT / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        return ((git / name).read_text().strip() if name != head else head)[:12]
    except OSError:  # installed, or a worktree
        return ""
