"""Where compiled programs are kept between runs."""

import jax
import pytest

from djepa_jax.runtime.compilation_cache import DEFAULT_SECONDS, use_compilation_cache

FOLDER, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def told():
    """What JAX is told: told(folder, seconds); as before at the end."""
    before = {name: getattr(jax.config, name) for name in (FOLDER, SECONDS)}

    def tell(folder, seconds=DEFAULT_SECONDS) -> tuple:
        jax.config.update(FOLDER, folder)
        jax.config.update(SECONDS, seconds)
        use_compilation_cache()
        return getattr(jax.config, FOLDER), getattr(jax.config, SECONDS)

    yield tell
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_unless_jax_was_told_where(told, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert told(None) == (f"/cache/djepa_jax/jax-{jax.__version__}", 0.0)
    assert told("gs://bucket/programs", 0.5) == ("gs://bucket/programs", 0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", "no home")
    assert told(None)[0] is None
