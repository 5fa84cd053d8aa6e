"""Which program runs: versions of packages, and the commit of a checkout."""

import pathlib
import platform
import subprocess

import flax
import jax
import jaxlib

CHECKOUT = pathlib.Path(__file__).parents[2]


def versions() -> dict[str, str]:
    """Of what figures depend on."""
    own = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    return own | {"python": platform.python_version()}


def commit() -> str:
    """Of the checkout that runs, "-dirty" if files differ from it; empty where it is not known."""
    words = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=12", "--dirty"]
    if not (CHECKOUT / ".git").exists():  # installed, perhaps below another project's checkout
        return ""
    try:
        ended = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip()
