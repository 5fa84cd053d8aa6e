"""Where compiled programs are kept between runs, and what XLA may print."""

import jax
import pytest

from djepa_jax.runtime import compilation_cache
from djepa_jax.runtime.compilation_cache import (
    DEFAULT_SECONDS,
    use_compilation_cache,
    without_alarms,
)

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


@pytest.mark.parametrize("chosen", ["1", "0", "2"])
def test_alarms_of_xla_are_off_while_it_compiles_unless_somebody_chose(chosen, monkeypatch):
    """JAX's own level is 1; it comes back whatever happens."""
    levels = []
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", chosen)
    monkeypatch.setattr(compilation_cache.utils, "absl_set_min_log_level", levels.append)
    with pytest.raises(ValueError), without_alarms():
        assert levels == ([3] if chosen == "1" else [])
        raise ValueError
    assert levels == ([3, 1] if chosen == "1" else [])
