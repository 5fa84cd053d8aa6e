"""The whole training path on real digits with a tiny model: resume, guard, sharding, records.

`simple_step` stands in for the training step where only what is around it matters.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from photos import labelled, write_folder
from processes import simple_step
from tiny import tiny_config
from workdirs import arrays, assert_same_arrays, digest, steps_in

from djepa_jax.checkpoints.integrity import CheckpointError
from djepa_jax.checkpoints.restore import find_model, latest_model
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.stored import to_stored
from djepa_jax.core import sharding, train_step
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.optimizer import (
    OptimizerConfig,
    make_optimizer,
    stop_frozen,
    update_values,
)
from djepa_jax.core.train_step import (
    StepValues,
    TrainState,
    TrainStepConfig,
    apply_update,
    batch_loss,
    draw_examples,
    init_state,
    make_train_step,
    state_shapes,
)
from djepa_jax.data.loader import device_batches
from djepa_jax.data.sources import load_digits
from djepa_jax.training import compile_step
from djepa_jax.training.initial_state import check_class_order
from djepa_jax.training.loop import TrainingError, train
from djepa_jax.training.reporting import Reporter

STEPS = 10
STOP = 7  # in the middle of an epoch
FIRST = 6  # steps that meshes are compared in


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Training ends without samples, whose program would have to be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "final_grid", lambda self, step, state: None)
        yield


@pytest.fixture
def simple(monkeypatch):
    monkeypatch.setattr(compile_step, "make_train_step", lambda config: simple_step)


def run_config(*extra):
    return tiny_config(
        f"--config.num_steps={STEPS}",
        "--config.evaluation.kind=none",
        "--config.data.random_flip=True",
        *extra,
    )


def metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("whole")
    assert train(run_config(), str(workdir)).finished
    return workdir


def test_stopping_and_resuming_changes_no_bit(uninterrupted, tmp_path):
    result = train(run_config(), str(tmp_path), should_stop=lambda step: step == STOP)
    assert not result.finished and result.step == STOP
    assert train(run_config(), str(tmp_path)).finished
    assert_same_arrays(arrays(uninterrupted, STEPS), arrays(tmp_path, STEPS))


def test_a_crash_costs_only_the_steps_since_the_last_save(simple, tmp_path):
    """A step that was saved in the background while training went on resumes to the same bits,
    too.
    """

    def crash(step):
        if step == 11:
            raise RuntimeError("power cut")
        return False

    workdir = tmp_path / "run"
    steps, flags = 12, ("--config.checkpoint_every=4", "--config.keep_checkpoints=2")
    every_four = run_config(f"--config.num_steps={steps}", *flags)
    with pytest.raises(RuntimeError, match="power cut"):
        train(every_four, str(workdir), should_stop=crash)
    assert steps_in(workdir) == ["4", "8"]
    assert train(every_four, str(workdir)).finished
    assert steps_in(workdir) == ["12", "8"]
    assert train(run_config(f"--config.num_steps={steps}"), str(tmp_path / "whole")).finished
    assert_same_arrays(arrays(tmp_path / "whole", steps), arrays(workdir, steps))
    assert [line["step"] for line in metrics(workdir)] == list(range(1, steps + 1))


def test_names_of_folders_are_those_of_the_checkpoint(simple, tmp_path):
    def write(root: pathlib.Path, names: list[str]) -> tuple[str, ...]:
        pictures = [(f"{name}/{i}", labelled()[i][1], 0) for name in names for i in range(2)]
        path = write_folder(tmp_path / root, pictures)
        place = ("source=folder", f"path={path}", "num_classes=0", "class_names=")
        return tuple(f"--config.data.{key}" for key in place)

    numbers = [str(number) for number in range(1, 11)]
    data, workdir = write("numbers", numbers), str(tmp_path / "run")
    train(run_config(*data, "--config.num_steps=2"), workdir)
    stored = find_model(workdir).config
    assert stored.class_names == tuple(numbers) and stored.data.num_classes == 10
    assert train(run_config(*data, "--config.num_steps=3"), workdir).experiment.data == stored.data
    # sampling needs no data, and knows them by name
    asked = run_config("--config.data.num_classes=0", "--config.sample.labels=10,2")
    known = asked.completed_by(latest_model(asked, workdir).config)
    assert known.sample_conditions.tolist()[:2] == [9, 1]
    others = write("others", [str(number) for number in range(10)])
    with pytest.raises(ConfigError, match='"1" is another class'):
        train(run_config(*others, "--config.num_steps=4"), workdir)


def test_folders_that_an_earlier_version_counted_as_text_are_refused():
    numbers = [str(number) for number in range(12)]
    for config in ({}, {"format": 2}):
        with pytest.raises(ConfigError, match="0, 1, 10, 11 and so on.*another --workdir"):
            check_class_order(config, numbers)
        for folders in (numbers[:10], ["c0", "c1", "c10", "c2"], ()):
            check_class_order(config, folders)
    check_class_order(to_stored(tiny_config()), numbers)


def test_metrics_of_every_step_are_recorded(uninterrupted):
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    names = (
        "loss token_loss jepa_loss grad_norm param_norm learning_rate skipped_steps target_std "
        "target_rank cosine images_per_second data_wait_share"
    )
    for name in names.split():
        assert all(np.isfinite(line[name]) for line in lines), name
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    assert list(uninterrupted.glob("events.out.tfevents*"))
    stored = json.loads((uninterrupted / "config.json").read_text())
    assert stored["model"]["width"] == 16 and stored["num_steps"] == STEPS


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


def test_more_steps_go_on_from_a_finished_run_unless_its_checkpoint_is_damaged(
    simple, tmp_path, capsys
):
    two, three = (run_config(f"--config.num_steps={steps}") for steps in (2, 3))
    assert train(two, str(tmp_path / "two")).finished
    for name, damage in DAMAGE.items():
        workdir = tmp_path / name
        shutil.copytree(tmp_path / "two", workdir)
        damage(workdir / "checkpoints" / "2")
        before = digest(workdir / "checkpoints")
        with pytest.raises(CheckpointError, match="can be used, and nothing was changed"):
            train(three, str(workdir))
        assert digest(workdir / "checkpoints") == before, name
    capsys.readouterr()
    assert train(three, str(tmp_path / "two")).step == 3
    output = capsys.readouterr().out
    assert "going on from step 2" in output and "num_steps: 2 -> 3" in output


def test_a_mesh_that_does_not_divide_what_it_splits_is_refused(tmp_path):
    for mesh, name, number in (((1, 8, 1), "width", 20), ((1, 1, 8), "num_heads", 2)):
        experiment = run_config().updated({f"model.{name}": number, "mesh": mesh})
        words = rf"splits model\.{name} {number} over 8 devices.*must divide"
        with pytest.raises(ConfigError, match=words):
            train(experiment, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- bad steps


def bad_from(first: int, monkeypatch):
    """Instead of the training step one whose gradients are NaN from some step on."""

    def make_step(config: TrainStepConfig):
        optimizer = make_optimizer(config.optimizer)

        def step(state: TrainState, batch: dict, values: StepValues):
            value = jnp.where(state.step >= first, jnp.nan, jnp.mean(batch["example"]))
            grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), state.params)
            found = {"loss": value, "grad_norm": optax.tree.norm(grads)}
            return apply_update(values.update, optimizer, state, grads, found)

        return step

    monkeypatch.setattr(compile_step, "make_train_step", make_step)


def test_too_many_bad_steps_stop_the_run(tmp_path, monkeypatch):
    bad_from(6, monkeypatch)
    config = run_config("--config.max_bad_steps=3", "--config.checkpoint_every=4")
    with pytest.raises(TrainingError, match=r"3 steps in a row.*step 9.*checkpoint is step 8 "):
        train(config, str(tmp_path))
    assert all(np.isfinite(value).all() for value in arrays(tmp_path, 8).values())


def test_a_run_without_one_good_step_is_not_complete(tmp_path, monkeypatch):
    def bad_step(state: TrainState, batch: dict, values):
        counted = ("step", "skipped_steps", "bad_streak")
        more = {name: getattr(state, name) + 1 for name in counted}
        return dataclasses.replace(state, **more), {
            "loss": jnp.nan,
            "bad_streak": more["bad_streak"],
        }

    monkeypatch.setattr(compile_step, "make_train_step", lambda config: bad_step)
    with pytest.raises(TrainingError, match="2 steps in a row.*none yet"):
        train(run_config("--config.num_steps=2"), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


# ---------------------------------------------------------------- the step itself


@pytest.fixture(scope="module")
def step_parts():
    """Training settings, the step on one device, a state, and the first batches of a run (float
    images, so that they can be NaN).
    """
    experiment, mesh = run_config(), sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    read = itertools.islice(device_batches(experiment, load_digits(), mesh, 0), FIRST)
    batches = [
        {"example": np.asarray(batch["example"], np.float32)}
        | {"condition": np.asarray(batch["condition"])}
        for batch in read
    ]
    config = experiment.train
    state = init_state(config)
    return config, jax.jit(make_train_step(config)), state, batches


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_non_finite_step_changes_nothing_but_counters(step_parts):
    _, step, state, batches = step_parts
    state, _ = step(state, batches[0])
    nan = np.full_like(batches[1]["example"], np.nan)
    bad, found = step(state, batches[1] | {"example": nan})
    for name in ("params", "ema_params", "opt_state"):
        for before, after in zip(
            leaves(getattr(state, name)), leaves(getattr(bad, name)), strict=True
        ):
            np.testing.assert_array_equal(before, after)
    assert int(bad.step) == 2 and int(bad.skipped_steps) == 1 and int(found["bad_streak"]) == 1
    good, found = step(bad, batches[2])
    assert int(found["bad_streak"]) == 0 and int(good.skipped_steps) == 1
    assert any((a != b).any() for a, b in zip(leaves(bad.params), leaves(good.params), strict=True))


@pytest.fixture(scope="module")
def head_step(step_parts):
    """The step that trains the denoising head alone."""
    config = step_parts[0]
    head = dataclasses.replace(config.optimizer, parts="denoiser", weight_decay=0.1, warmup_steps=0)
    return jax.jit(make_train_step(dataclasses.replace(config, optimizer=head)))


def test_parts_that_are_not_trained_stay_to_the_bit(step_parts, head_step):
    _, _, state, batches = step_parts
    noisy = dataclasses.replace(  # as if all parts had been trained before, and not yet averaged
        state, opt_state=jax.tree.map(lambda x: x + jnp.ones_like(x), state.opt_state)
    )
    new, found = head_step(noisy, batches[0])
    assert int(new.skipped_steps) == 0 and np.isfinite(found["loss"])
    for kind in ("params", "ema_params"):
        before, after = getattr(noisy, kind), getattr(new, kind)
        for part in before:
            pairs = zip(leaves(before[part]), leaves(after[part]), strict=True)
            assert any((a != b).any() for a, b in pairs) == (part == "denoiser"), (kind, part)


def test_a_head_learns_under_conditions_of_the_averaged_networks(step_parts, head_step):
    """Whatever the others' parameters are: samples are drawn with their average."""
    _, _, state, batches = step_parts
    elsewhere = jax.tree.map(lambda x: x + 1, state.params)
    elsewhere |= {"denoiser": state.params["denoiser"]}
    moved = dataclasses.replace(state, params=elsewhere)
    new, other = head_step(state, batches[0])[0], head_step(moved, batches[0])[0]
    pairs = zip(leaves(new.params["denoiser"]), leaves(other.params["denoiser"]), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_not_trained_has_no_gradient_and_the_rest_has_the_same(step_parts):
    config, _, state, batches = step_parts

    def gradient(parts):
        settings = dataclasses.replace(config.optimizer, parts=parts)

        def loss(params):
            params = stop_frozen(settings, params, state.ema_params)
            return loss_of(config, params, state.ema_params, batches[0])[0]

        return jax.jit(jax.grad(loss))(state.params)

    every, some = gradient("all"), gradient("denoiser, jepa_head")
    for part in every:
        same = part in ("denoiser", "jepa_head")
        for ours, whole in zip(leaves(some[part]), leaves(every[part]), strict=True):
            np.testing.assert_allclose(ours, whole * same, rtol=1e-4, atol=1e-7)


def test_finite_gradient_with_a_non_finite_update_changes_nothing():
    config = OptimizerConfig(learning_rate=1e38, num_steps=1, weight_decay=0.0)
    optimizer = optax.sgd(1e38)  # whose updates of gradients of 100 are infinite
    params, zero = {"w": jnp.ones(3)}, jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, params, optimizer.init(params), zero, zero)
    found = {"loss": jnp.ones(()), "grad_norm": jnp.ones(())}
    after, _ = apply_update(
        update_values(config, zero), optimizer, state, {"w": jnp.full(3, 100.0)}, found
    )
    assert int(after.skipped_steps) == 1
    np.testing.assert_array_equal(after.params["w"], 1)
    np.testing.assert_array_equal(after.ema_params["w"], 1)


def loss_of(config: TrainStepConfig, params, ema_params, batch: dict):
    """Loss and metrics of a batch, with some randomness."""
    key, (graph, _) = jax.random.key(0), split_model(config.model)
    tokens = config.modality.tokenize(batch["example"], key)
    examples = draw_examples(config, config, tokens, batch["condition"], key, key)
    token_keys = jax.random.split(key, config.masking.batch_size // config.masking.pack_size)
    return batch_loss(config, graph, params, ema_params, examples, token_keys)


def test_target_encoder_carries_no_gradient(step_parts):
    config, _, state, batches = step_parts

    def loss(ema_params):
        return loss_of(config, state.params, ema_params, batches[0])[0]

    grads = jax.jit(jax.grad(loss))(state.ema_params)
    assert all((leaf == 0).all() for leaf in leaves(grads))


PARTS = (
    "--config.batch_size=128",
    "--config.loss.mask_group=4",
    "--config.model.attention_dropout=0.1",
    "--config.model.dropout=0.1",
    "--config.optimizer.warmup_steps=0",
)


def test_gradients_of_parts_add_up_to_the_batch(step_parts, monkeypatch):
    """With dropout, too: an example drops the same wherever it stands."""

    def keep_gradients(values, transform, state, grads, metrics):
        """In place of the update, half of what would have to be compiled."""
        return dataclasses.replace(state, opt_state=grads), metrics

    monkeypatch.setattr(train_step, "apply_update", keep_gradients)
    rng = np.random.default_rng(0)
    examples = rng.integers(0, 256, (128, 8, 8, 1), np.uint8)
    batch = {"example": examples, "condition": rng.integers(0, 10, 128, np.int32)}
    config = tiny_config(*PARTS).train
    state, results = step_parts[2], []
    for parts in (1, 4):
        config = dataclasses.replace(config, grad_accumulation_steps=parts)
        after, found = jax.jit(make_train_step.__wrapped__(config))(state, batch)
        found = {name: float(found[name]) for name in ("loss", "grad_norm")}
        results.append((leaves(after.opt_state), found))
    (expected, whole), (gradients, found) = results
    assert found == pytest.approx(whole, rel=1e-5)
    for part, whole in zip(gradients, expected, strict=True):
        tolerance = 1e-5 * max(np.abs(whole).max(), 1e-12)
        np.testing.assert_allclose(part, whole, rtol=0, atol=tolerance)


def test_losses_do_not_depend_on_the_mesh(step_parts, uninterrupted):
    config, step, start, batches = step_parts
    state, expected = start, []
    for batch in batches:
        state, found = step(state, batch)
        expected.append(float(found["loss"]))
    on_all_devices = [line["loss"] for line in metrics(uninterrupted)[:FIRST]]  # mesh (8, 1, 1)
    np.testing.assert_allclose(on_all_devices, expected, rtol=1e-5)
    mesh, actual = sharding.make_mesh((2, 2, 2)), []  # every way of splitting at once
    shardings = sharding.state_shardings(start, mesh)
    state = jax.device_put(start, shardings)
    sharded_step = jax.jit(make_train_step(config), out_shardings=(shardings, None))
    for batch in batches:
        placed = jax.device_put(batch, sharding.batch_sharding(mesh))
        state, found = sharded_step(state, placed)
        actual.append(float(found["loss"]))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_without_jepa_there_is_no_head_and_no_target(step_parts):
    config, (batch, *_) = run_config("--config.loss.jepa_weight=0").train, step_parts[3]
    params = {name: leaf for name, leaf in step_parts[2].params.items() if name != "jepa_head"}
    abstract = state_shapes(config).params
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    loss, found = jax.jit(lambda params: loss_of(config, params, None, batch))(params)
    assert found.keys() == {"token_loss"} and float(loss) == float(found["token_loss"])
