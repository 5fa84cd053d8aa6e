"""Keeping compiled programs between runs."""

import os
import pathlib

import jax


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, one folder per JAX version, unless JAX was told where."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not jax.config.jax_compilation_cache_dir and os.path.isabs(root):  # there are users without a home
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(root) / "djepa_jax" / f"jax-{jax.__version__}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # so that going on compiles nothing at all
