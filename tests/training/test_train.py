"""The whole training path on real digits with a tiny model: resume, guard, sharding, records."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from tiny import tiny_config

from djepa_jax.checkpoints.checkpointer import Checkpoints, read_meta
from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.checkpoints.restore import restore_state
from djepa_jax.config import experiment as configuration
from djepa_jax.core import sharding
from djepa_jax.core.optimizer import OptimizerConfig, make_optimizer
from djepa_jax.core.train_step import TrainState, apply_update, init_state, make_train_step
from djepa_jax.data.sources import load_digits
from djepa_jax.training.loop import TrainingError, train

STEPS = 20
STOPS = (7, 9)  # 112 examples make no whole epoch, so both stops are in the middle of one


def run_config(*extra):
    return tiny_config(
        f"--config.num_steps={STEPS}",
        "--config.evaluation.kind=none",
        "--config.data.random_flip=True",
        *extra,
    )


def final_arrays(workdir) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, by path."""
    experiment = configuration.build(run_config())
    abstract = jax.eval_shape(lambda: init_state(experiment.train))
    mesh = sharding.make_mesh((-1, 1, 1))
    shardings = sharding.state_shardings(abstract, mesh)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    folder = Checkpoints(workdir).latest_folder()
    state = TrainState(**restore_state(folder, target, read_meta(folder)))
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("whole")
    assert train(run_config(), str(workdir)).finished
    return workdir


def test_stopping_and_resuming_changes_no_bit(uninterrupted, tmp_path):
    for stop in STOPS:
        result = train(
            run_config(), str(tmp_path), should_stop=lambda step, stop=stop: step == stop
        )
        assert not result.finished and result.step == stop
    assert train(run_config(), str(tmp_path)).finished
    expected, actual = final_arrays(uninterrupted), final_arrays(tmp_path)
    assert expected.keys() == actual.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)


def test_a_crash_costs_only_the_steps_since_the_last_save(uninterrupted, tmp_path):
    """A step that was saved in the background while training went on resumes to the same bits,
    too.
    """

    def crash(step):
        if step == 15:
            raise RuntimeError("power cut")
        return False

    every_four = run_config("--config.checkpoint_every=4", "--config.keep_checkpoints=2")
    with pytest.raises(RuntimeError, match="power cut"):
        train(every_four, str(tmp_path), should_stop=crash)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "8"]
    assert train(every_four, str(tmp_path)).finished
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["16", "20"]
    expected, actual = final_arrays(uninterrupted), final_arrays(tmp_path)
    for path, value in expected.items():
        np.testing.assert_array_equal(actual[path], value, err_msg=path)
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, STEPS + 1))


def test_metrics_of_every_step_are_recorded(uninterrupted):
    lines = [
        json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = (
        "loss token_loss jepa_loss grad_norm param_norm learning_rate skipped_steps target_std "
        "target_rank cosine"
    )
    for name in (*names.split(), "images_per_second", "data_wait_share"):
        assert all(np.isfinite(line[name]) for line in lines), name
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    assert list(uninterrupted.glob("events.out.tfevents*"))
    stored = json.loads((uninterrupted / "config.json").read_text())
    assert stored["model"]["width"] == 16 and stored["num_steps"] == STEPS


def test_more_steps_go_on_from_a_finished_run(tmp_path, capsys):
    train(run_config("--config.num_steps=2"), str(tmp_path))
    train(run_config("--config.num_steps=3"), str(tmp_path))
    output = capsys.readouterr().out
    assert "going on from step 2" in output and "num_steps: 2 -> 3" in output


def cut(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_arrays(step: pathlib.Path):
    for path in step.glob("state/**/d/*"):
        cut(path)


DAMAGE = {
    "arrays cut": cut_arrays,
    "description gone": lambda step: (step / "state" / "_METADATA").unlink(),
    "meta cut": lambda step: cut(step / "meta" / "metadata"),
    "state gone": lambda step: shutil.rmtree(step / "state"),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("two") / "run"
    train(run_config("--config.num_steps=2"), str(workdir))
    return workdir


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_an_error_and_stays(two_steps, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(two_steps, workdir)
    step = workdir / "checkpoints" / "2"
    DAMAGE[damage](step)
    before = sorted(path for path in step.rglob("*"))
    with pytest.raises(CheckpointError, match="can be used, and nothing was changed"):
        train(run_config(), str(workdir))
    assert sorted(path for path in step.rglob("*")) == before
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]


# ---------------------------------------------------------------- the step itself


@pytest.fixture(scope="module")
def step_parts():
    config = run_config("--config.mesh=(-1,1,1)")
    experiment = configuration.build(config)
    source = load_digits()
    batches = [
        {
            "image": source.images[i * 16 : (i + 1) * 16],
            "label": source.labels[i * 16 : (i + 1) * 16],
        }
        for i in range(6)
    ]
    return (
        experiment,
        jax.jit(make_train_step(experiment.train)),
        jax.jit(lambda: init_state(experiment.train)),
        batches,
    )


def poisoned(batch: dict) -> dict:
    """A batch that makes loss and gradients NaN."""
    return batch | {"image": np.full(batch["image"].shape, np.nan, np.float32)}


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_non_finite_step_changes_nothing_but_counters(step_parts):
    _, step, make_state, batches = step_parts
    as_float = [{**b, "image": b["image"].astype(np.float32)} for b in batches]
    state, _ = step(make_state(), as_float[0])
    bad, metrics = step(state, poisoned(as_float[1]))
    for name in ("params", "ema_params", "opt_state"):
        for before, after in zip(
            leaves(getattr(state, name)), leaves(getattr(bad, name)), strict=True
        ):
            np.testing.assert_array_equal(before, after)
    assert int(bad.step) == 2 and int(bad.skipped_steps) == 1 and int(metrics["bad_streak"]) == 1
    good, metrics = step(bad, as_float[2])
    assert int(metrics["bad_streak"]) == 0 and int(good.skipped_steps) == 1
    assert any((a != b).any() for a, b in zip(leaves(bad.params), leaves(good.params), strict=True))


def test_finite_gradient_with_a_non_finite_update_changes_nothing():
    config = OptimizerConfig(learning_rate=float("inf"), num_steps=1)
    optimizer, params, zero = (
        make_optimizer(config),
        {"w": jax.numpy.ones(3)},
        jax.numpy.zeros((), jax.numpy.int32),
    )
    state = TrainState(zero, params, params, optimizer.init(params), zero, zero)
    metrics = {"loss": jax.numpy.ones(()), "grad_norm": jax.numpy.ones(())}
    after, _ = apply_update(config, optimizer, state, {"w": jax.numpy.ones(3)}, metrics)
    assert int(after.skipped_steps) == 1
    np.testing.assert_array_equal(after.params["w"], 1)
    np.testing.assert_array_equal(after.ema_params["w"], 1)


def poison_from(step: int, monkeypatch):
    """From this step on every batch that training sees is NaN."""
    healthy = make_train_step

    def poisoned_step(spec):
        inner = healthy(spec)

        def wrapped(state, batch):
            image = jax.numpy.where(
                state.step >= step, jax.numpy.nan, batch["image"].astype(jax.numpy.float32)
            )
            return inner(state, batch | {"image": image})

        return wrapped

    monkeypatch.setattr("djepa_jax.training.compile_step.make_train_step", poisoned_step)


def test_too_many_bad_steps_stop_the_run(tmp_path, monkeypatch):
    poison_from(6, monkeypatch)
    config = run_config("--config.max_bad_steps=3", "--config.checkpoint_every=4")
    with pytest.raises(TrainingError, match=r"3 steps in a row.*step 9.*checkpoint is step 8 "):
        train(config, str(tmp_path))
    saved = final_arrays(tmp_path)
    assert all(np.isfinite(value).all() for value in saved.values())


def test_a_run_without_one_good_step_is_not_complete(tmp_path, monkeypatch):
    poison_from(0, monkeypatch)
    with pytest.raises(TrainingError, match="2 steps in a row.*none yet"):
        train(run_config("--config.num_steps=2"), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_target_encoder_carries_no_gradient(step_parts):
    from djepa_jax.core.models.djepa import split_model
    from djepa_jax.core.train_step import batch_loss, draw_examples

    experiment, _, make_state, batches = step_parts
    spec, state = experiment.train, make_state()
    graph, _ = split_model(spec.model)
    key = jax.random.key(0)
    examples = draw_examples(
        spec, spec.tokenize(batches[0]["image"]), batches[0]["label"], key, key
    )
    token_keys = jax.random.split(key, spec.plan.batch_size // spec.plan.chunk_size)

    def loss(ema_params):
        return batch_loss(spec, graph, state.params, ema_params, examples, token_keys)[0]

    grads = jax.jit(jax.grad(loss))(state.ema_params)
    assert all((leaf == 0).all() for leaf in leaves(grads))


PARTS = (
    "--config.batch_size=128",
    "--config.loss.mask_group=4",
    "--config.model.attention_dropout=0.1",
)


@pytest.mark.parametrize("variant, rate", [("flow", 0.1), ("diffusion", 0.0)])
def test_gradients_of_parts_add_up_to_the_batch(variant, rate):
    """With dropout, too: an example drops the same wherever it stands."""
    results = []
    for parts in (1, 4):
        config = tiny_config(
            *PARTS,
            f"--config.model.dropout={rate}",
            f"--config.microbatches={parts}",
            variant=variant,
        )
        config.optimizer.warmup_steps = 0
        spec = configuration.build(config).train
        rng = np.random.default_rng(0)
        batch = {
            "image": rng.integers(0, 256, (128, 8, 8, 1), np.uint8),
            "label": rng.integers(0, 10, 128, np.int32),
        }
        state, metrics = jax.jit(make_train_step(spec))(init_state(spec), batch)
        results.append(
            (
                leaves(state.opt_state),
                {k: float(v) for k, v in metrics.items() if k in ("loss", "grad_norm")},
            )
        )
    for moments, metrics in results[1:]:
        assert metrics == pytest.approx(results[0][1], rel=1e-5)
        for part, whole in zip(moments, results[0][0], strict=True):
            np.testing.assert_allclose(
                part, whole, rtol=0, atol=1e-5 * max(np.abs(whole).max(), 1e-12)
            )


def test_parts_must_be_whole_chunks():
    with pytest.raises(configuration.ConfigError, match="microbatches is 3"):
        configuration.build(tiny_config("--config.batch_size=64", "--config.microbatches=3"))


MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_losses_do_not_depend_on_the_mesh(step_parts, mesh_shape):
    experiment, step, make_state, batches = step_parts
    state, expected = make_state(), []
    for batch in batches:
        state, metrics = step(state, batch)
        expected.append(float(metrics["loss"]))
    mesh = sharding.make_mesh(mesh_shape)
    shardings = sharding.state_shardings(jax.eval_shape(make_state), mesh)
    state = jax.jit(lambda: init_state(experiment.train), out_shardings=shardings)()
    sharded_step = jax.jit(
        make_train_step(experiment.train), donate_argnums=0, out_shardings=(shardings, None)
    )
    actual = []
    for batch in batches:
        state, metrics = sharded_step(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        actual.append(float(metrics["loss"]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_without_jepa_there_is_no_head_and_no_target():
    config = run_config("--config.loss.jepa_weight=0")
    experiment = configuration.build(config)
    state = jax.jit(lambda: init_state(experiment.train))()
    assert "jepa_head" not in state.params
    source = load_digits()
    _, metrics = jax.jit(make_train_step(experiment.train))(
        state, {"image": source.images[:16], "label": source.labels[:16]}
    )
    assert "jepa_loss" not in metrics and float(metrics["loss"]) == float(metrics["token_loss"])


@pytest.mark.parametrize("mesh, width", [((1, 8, 1), 20), ((1, 1, 8), 16)])
def test_mesh_that_does_not_divide_what_it_splits_is_refused(tmp_path, mesh, width):
    config = run_config(f"--config.model.width={width}")
    config.mesh = mesh
    with pytest.raises(
        configuration.ConfigError,
        match=r"splits model\.(width 20|num_heads 2) over 8 devices.*must divide",
    ):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_labels_are_dropped_at_the_given_rate():
    from djepa_jax.core.train_step import drop_labels

    labels = jax.numpy.zeros(20_000, jax.numpy.int32)
    dropped = np.asarray(drop_labels(jax.random.key(0), labels, 0.1, 10))
    assert set(np.unique(dropped)) == {0, 10} and abs((dropped == 10).mean() - 0.1) < 0.01
