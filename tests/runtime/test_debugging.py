"""What is compiled, and the switches for looking into a run."""

import jax
import numpy as np
import pytest
from processes import CONTEXT, keep_compiled, start
from tiny import tiny_config

from djepa_jax.runtime.profiling import ProfileWindow
from djepa_jax.training import compile_step
from djepa_jax.training.loop import train

STEPS = 1000
COMPILED, MISSED = (
    "/jax/core/compile/backend_compile_duration",
    "/jax/compilation_cache/cache_misses",
)


def long_config():
    often = ("--config.checkpoint_every=250", "--config.sample_every=200", "--config.log_every=100")
    return tiny_config(f"--config.num_steps={STEPS}", *often, "--config.evaluation.kind=none")


def count_programs(workdir: str, cache: str, stop: int, pipe) -> None:
    """Train in a process of its own; send what was compiled, how much of it before each step, and
    how much was not cached.
    """
    keep_compiled(cache)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compiled, missed, before = [], [], []
    listen = jax.monitoring.register_event_duration_secs_listener
    listen(lambda event, _, **of: event == COMPILED and compiled.append(of["fun_name"]))
    jax.monitoring.register_event_listener(lambda event, **_: event == MISSED and missed.append(1))

    def count(step: int) -> bool:
        before.append(len(compiled))
        return step == stop

    train(long_config(), workdir, should_stop=count)
    pipe.send({"names": compiled, "before": before, "missed": len(missed)})


def counts(workdir, cache, stop: int) -> dict:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = start(count_programs, str(workdir), str(cache), stop, theirs)
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def test_a_thousand_steps_compile_nothing_after_the_first(tmp_path):
    """But for the first grid; and a run that goes on finds all programs in the cache."""
    first = counts(tmp_path / "run", tmp_path / "cache", stop=STEPS - 1)
    before = first["before"]  # the first step, and each after it
    assert len(before) == STEPS and first["names"].count("jit(train_step)") == 1
    assert before[0] < 40, "small programs that make the first state are compiled one by one"
    assert before[199] == before[0], "something was compiled while nothing but steps was made"
    assert before[-1] == before[250], "something was compiled by the second save or grid"
    assert before[249] - before[199] <= 5 and before[250] == before[249], (
        "a grid, or a save, has more programs than planned"
    )
    assert first["missed"] >= 3
    again = counts(tmp_path / "run", tmp_path / "cache", stop=-1)
    assert len(again["before"]) == 2 and again["missed"] == 0


def test_nans_are_found_where_they_arise(tmp_path, monkeypatch):
    def poisoned(spec):
        return lambda state, batch: (
            state,
            {"loss": jax.numpy.log(-batch["example"].astype("float32") - 1).sum()},
        )

    monkeypatch.setattr(compile_step, "make_train_step", poisoned)
    with pytest.raises(FloatingPointError, match="nan"):
        train(
            tiny_config("--config.debug.nans=True", "--config.evaluation.kind=none"), str(tmp_path)
        )
    assert not jax.config.jax_debug_nans


def test_compilations_are_logged_and_steps_traced_when_asked(tmp_path, caplog):
    flags = (
        "--config.debug.profile_start=1",
        "--config.debug.profile_steps=1",
        "--config.debug.log_compiles=True",
    )
    train(tiny_config(*flags, "--config.evaluation.kind=none"), str(tmp_path))
    assert any(
        "Compiling" in record.message and "train_step" in record.message
        for record in caplog.records
    )
    assert not jax.config.jax_log_compiles
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize(
    ("first", "count", "traced"), [(1, 2, [1, 3]), (1, 50, [1, 5]), (10, 1, []), (2, 0, [])]
)
def test_trace_of_the_chosen_steps(first, count, traced, monkeypatch):
    """A window that the run leaves early is written all the same; one that it never reaches is
    not.
    """
    made, done = [], 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(done))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append(done))
    window = ProfileWindow("folder", first, count)
    for _ in range(5):
        window.before_step()
        done += 1
        window.after_step({})
    window.close()
    assert made == traced


def test_sampling_with_less_memory_gives_the_same_pictures(monkeypatch, capsys):
    """Batches are halved until they fit; when one sample a device does not, the failure is told as
    it is.
    """
    from djepa_jax.config import experiment as configuration
    from djepa_jax.core import sharding
    from djepa_jax.core.models.djepa import init_params
    from djepa_jax.sampling.sample_to_npz import generator

    config = tiny_config()
    experiment, mesh = configuration.build(config), sharding.make_mesh((-1, 1, 1))
    params = init_params(experiment.train.model, jax.random.key(0))
    labels = np.arange(20) % 10
    expected = generator.Generator(config, experiment, mesh)(params, labels, seed=0)
    real = generator.jitted_sampler

    def limited(rows):
        def sampler(spec, mesh):
            def call(params, wanted, *rest):
                if len(wanted) > rows:
                    raise jax.errors.JaxRuntimeError(
                        "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes"
                    )
                return real(spec, mesh)(params, wanted, *rest)

            return call

        monkeypatch.setattr(generator, "jitted_sampler", sampler)

    limited(16)
    generator = generator.Generator(config, experiment, mesh)
    np.testing.assert_allclose(generator(params, labels, seed=0), expected, atol=1e-5)
    assert generator.batch_size == 16 and "going on with 16" in capsys.readouterr().out
    limited(4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        generator.Generator(config, experiment, mesh)(params, labels, seed=0)
