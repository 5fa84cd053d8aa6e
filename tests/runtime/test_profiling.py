"""What is compiled, and the switches for looking into a run."""

import jax
import pytest
from processes import CONTEXT, keep_compiled, simple_step, start
from tiny import tiny_config

from djepa_jax.runtime.profiling import ProfileWindow
from djepa_jax.training import compile_step
from djepa_jax.training.loop import train
from djepa_jax.training.reporting import Reporter

STEPS, SAMPLE, SAVE = 30, 8, 12
COMPILED = "/jax/core/compile/backend_compile_duration"
MISSED = "/jax/compilation_cache/cache_misses"


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

    often = (f"--config.checkpoint_every={SAVE}", f"--config.sample_every={SAMPLE}")
    flags = (f"--config.num_steps={STEPS}", *often, "--config.evaluation.kind=none")
    train(tiny_config(*flags), workdir, should_stop=count)
    pipe.send({"names": compiled, "before": before, "missed": len(missed)})


def counts(workdir, cache, stop: int) -> dict:
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = start(count_programs, str(workdir), str(cache), stop, theirs)
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


def test_steps_compile_nothing_after_the_first(tmp_path):
    """But for the first grid and save; and a run that goes on finds all programs in the cache."""
    real = tmp_path / "run" / "samples" / "real.png"  # there already: made once, not with a grid
    real.parent.mkdir(parents=True)
    real.touch()
    first = counts(tmp_path / "run", tmp_path / "cache", stop=STEPS - 1)
    before = first["before"]  # the first step, and each after it
    assert len(before) == STEPS and first["names"].count("jit(train_step)") == 1
    assert before[0] < 40, "small programs that make the first state are compiled one by one"
    assert before[SAMPLE - 1] == before[0], "a program was compiled where nothing but steps is made"
    assert before[SAVE - 1] - before[SAMPLE - 1] <= 5, "a grid has more programs than planned"
    assert before[SAVE] == before[SAVE - 1], "a save has a program of its own"
    assert before[-1] == before[SAVE], "something was compiled by the second save or grid"
    assert first["missed"] >= 3
    again = counts(tmp_path / "run", tmp_path / "cache", stop=-1)
    assert len(again["before"]) == 2 and again["missed"] == 0


def test_nans_are_found_where_they_arise(tmp_path, monkeypatch):
    def poisoned(spec):
        def step(state, batch, values):
            image = batch["example"].astype("float32")
            return state, {"loss": jax.numpy.log(-image - 1).sum()}

        return step

    monkeypatch.setattr(compile_step, "make_train_step", poisoned)
    flags = ("--config.debug.nans=True", "--config.evaluation.kind=none")
    with pytest.raises(FloatingPointError, match="nan"):
        train(tiny_config(*flags), str(tmp_path))
    assert not jax.config.jax_debug_nans


def test_compilations_are_logged_and_steps_traced_when_asked(tmp_path, caplog, monkeypatch):
    def train_step(state, batch, values):  # none that was compiled before
        return simple_step(state, batch, values)

    monkeypatch.setattr(compile_step, "make_train_step", lambda config: train_step)
    monkeypatch.setattr(Reporter, "final_grid", lambda self, step, state: None)
    debug = {"profile_start": 1, "profile_steps": 1, "log_compiles": True}
    flags = [f"--config.debug.{name}={value}" for name, value in debug.items()]
    train(tiny_config(*flags, "--config.evaluation.kind=none"), str(tmp_path))
    compiling = [record.message for record in caplog.records if "Compiling" in record.message]
    assert any("train_step" in message for message in compiling)
    assert not jax.config.jax_log_compiles
    assert len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))) == 1


def test_a_trace_is_of_the_chosen_steps(monkeypatch):
    """A window that the run leaves early is written all the same; one never reached is not."""
    made, passed = [], [0]
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(passed[0]))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append(passed[0]))
    for first, count, traced in ((1, 2, [1, 3]), (1, 50, [1, 5]), (10, 1, []), (2, 0, [])):
        made.clear()
        passed[0], window = 0, ProfileWindow("folder", first, count)
        for _ in range(5):
            window.before_step()
            passed[0] += 1
            window.after_step({})
        window.close()
        assert made == traced
