"""Compiling: programs kept between runs, and what XLA prints meanwhile."""

import contextlib
import os
from collections.abc import Iterator

import jax
from jaxlib import utils

from djepa_jax.runtime.storage import user_cache

DEFAULT_SECONDS = 1.0  # of compiling, below which JAX keeps no program unless it is told to


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless JAX was told where."""
    folder = user_cache(f"jax-{jax.__version__}")
    if folder is not None and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_persistent_cache_min_compile_time_secs == DEFAULT_SECONDS:
        # So that a run that goes on compiles nothing at all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def without_alarms() -> Iterator[None]:
    """Keep XLA from printing that compiling is slow and how to report it; failures are raised."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "1":  # JAX's own value: nobody chose another
        yield
        return
    utils.absl_set_min_log_level(3)  # errors, as these are called, are left out
    try:
        yield
    finally:
        utils.absl_set_min_log_level(1)
