"""Training goes on from an import: the moments of PyTorch's AdamW, and starts without them."""

import copy
import functools
import json
import re

import jax
import numpy as np
import optax
import pytest
import torch
from conftest import assert_close, load_parity
from official_files import assert_same, config_of, read_workdir, training_file
from safetensors.numpy import save_file
from tiny import run, tiny_config

from djepa_jax.checkpoints.convert.import_weights import run_import
from djepa_jax.checkpoints.convert.official import from_official, official_shapes, to_official
from djepa_jax.core.models.djepa import split_model
from djepa_jax.core.optimizer import OptimizerConfig, decay_mask, make_optimizer
from djepa_jax.training.reporting import Reporter

LEARNING_RATE, DECAY, STEPS = 1e-2, 0.1, 3
SAME_UPDATE = 1e-6
GROUPINGS = {
    "the authors' two groups": (False, True),
    "the other way round": (True, False),
    "one group": None,
}


@functools.cache
def decayed_names() -> set[str]:
    """The authors' names of what decays."""
    abstract = load_parity("gauss").abstract
    flags = jax.tree.map(
        lambda leaf, decayed: np.full(leaf.shape, decayed), abstract, decay_mask(abstract)
    )
    return {name for name, flag in to_official(flags).items() if flag.all()}


class Trainer:
    """PyTorch training of a model's tensors, in an order that is neither alphabetical nor ours."""

    def __init__(self, tensors: dict[str, np.ndarray], grouping: str, steps: int = STEPS):
        rng = np.random.default_rng(0)
        names = rng.permutation(sorted(tensors)).tolist()
        self.parameters = {
            name: torch.nn.Parameter(torch.from_numpy(tensors[name].copy())) for name in names
        }
        self.gradients = {
            name: 1e-2 * rng.standard_normal((steps + 1, *tensors[name].shape), np.float32)
            for name in names
        }
        self.decay = DECAY if GROUPINGS[grouping] else 0.0
        self.optimizer = torch.optim.AdamW(
            self._groups(grouping), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-6
        )
        for number in range(steps):
            self.step(number)

    def _groups(self, grouping: str) -> list[dict]:
        kinds = GROUPINGS[grouping]
        if kinds is None:
            return [{"params": list(self.parameters.values()), "weight_decay": 0.0}]
        apart = {
            kind: [p for name, p in self.parameters.items() if (name in decayed_names()) == kind]
            for kind in kinds
        }
        return [{"params": apart[kind], "weight_decay": DECAY * kind} for kind in kinds]

    def step(self, number: int) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(self.gradients[name][number])
        self.optimizer.step()

    def file(self, optimizer: dict | None = None) -> dict:
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        return training_file(weights, weights, optimizer=optimizer or self.optimizer.state_dict())

    def numpy(self, read) -> dict[str, np.ndarray]:
        return {
            name: read(parameter).detach().numpy().copy()
            for name, parameter in self.parameters.items()
        }


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_the_next_update_is_the_one_that_pytorch_makes(gauss, grouping, tmp_path):
    trainer = Trainer(gauss.tensors, grouping)
    torch.save(trainer.file(), tmp_path / "checkpoint.pth")
    config = config_of(gauss)
    report = run_import(config, str(tmp_path / "run"), str(tmp_path / "checkpoint.pth"))
    assert f"optimiser: its moments, from step {STEPS}, where training goes on" in report
    parts, step = read_workdir(tmp_path / "run", config)
    assert step == parts["step"] == STEPS and parts["skipped_steps"] == parts["bad_streak"] == 0
    (adam,) = [s for s in jax.tree.leaves(parts["opt_state"], is_leaf=is_adam) if is_adam(s)]
    state = trainer.optimizer.state
    assert adam.count == STEPS
    counters = [leaf for leaf in jax.tree.leaves(parts["opt_state"]) if leaf.ndim == 0]
    assert counters and all(leaf == STEPS for leaf in counters)  # those of schedules too
    assert_same(to_official(adam.mu), trainer.numpy(lambda p: state[p]["exp_avg"]))
    assert_same(to_official(adam.nu), trainer.numpy(lambda p: state[p]["exp_avg_sq"]))

    trainer.step(STEPS)
    settings = OptimizerConfig(
        LEARNING_RATE, num_steps=10, weight_decay=trainer.decay, clip_norm=1e9
    )
    gradients = {name: values[STEPS] for name, values in trainer.gradients.items()}

    @jax.jit
    def update(gradients, opt_state, params):
        updates, _ = make_optimizer(settings).update(gradients, opt_state, params)
        return optax.apply_updates(params, updates)

    gradients = from_official(gradients, gauss.abstract)
    ours = to_official(update(gradients, parts["opt_state"], parts["params"]))
    for name, expected in trainer.numpy(lambda p: p).items():
        assert_close(ours[name], expected, SAME_UPDATE)


def is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _one_parameter_less(state: dict) -> None:
    del state["param_groups"][1]["params"][-1]


def _parameters_numbered_backwards(state: dict) -> None:
    for group in state["param_groups"]:
        group["params"] = group["params"][::-1]


def _moments_of_another_shape(state: dict) -> None:
    state["state"][0]["exp_avg"] = torch.zeros(5, 5, 5)


def _moments_not_finite(state: dict) -> None:
    state["state"][0]["exp_avg_sq"][...] = torch.nan


def _not_adam(state: dict) -> None:
    state["state"] = {
        number: {"momentum_buffer": values["exp_avg"]} for number, values in state["state"].items()
    }


def _no_step_made(state: dict) -> None:
    state["state"] = {}


# what is wrong with the optimiser's state -> words of the line that says why it is left out
UNMATCHED = {
    _one_parameter_less: "numbered in an unknown way",
    _parameters_numbered_backwards: "numbered in an unknown way",
    _moments_of_another_shape: "numbered in an unknown way",
    _moments_not_finite: "not finite",
    _not_adam: "no state of Adam",
    _no_step_made: "no state of Adam",
}


def test_moments_that_cannot_be_matched_are_left_out(gauss, tmp_path):
    """In a file whose groups have the names that other programs give them."""
    trainer, config = Trainer(gauss.tensors, "the authors' two groups"), config_of(gauss)
    whole = trainer.file()
    for spoil, words in UNMATCHED.items():
        state = copy.deepcopy(trainer.optimizer.state_dict())
        spoil(state)
        content = {"model": whole["model"], "ema": whole["model_ema"], "opt": state}
        torch.save(content, tmp_path / "checkpoint.pth")
        workdir = tmp_path / spoil.__name__
        report = run_import(config, str(workdir), str(tmp_path / "checkpoint.pth"))
        assert report[-2].startswith("optimiser: none; training starts it afresh, from step 0")
        assert words in report[-2]
        assert ("not read: 'opt'" in report) == ("no state of Adam" in words)
    parts, step = read_workdir(workdir, config)
    assert step == 0 and parts.keys() == {"params", "ema_params"}
    assert_same(to_official(parts["params"]), trainer.numpy(lambda p: p))


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """Some weights of the tiny model under the authors' names."""
    _, abstract = split_model(tiny_config().network)
    rng = np.random.default_rng(0)
    shapes = official_shapes(abstract)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def no_grid(self, step, state):
    """No samples at the end of training, whose program would have to be compiled."""


def test_training_goes_on_from_imported_weights(tensors, tmp_path, capsys, monkeypatch):
    """The first update of the warm-up has learning rate 0, so what it leaves is what training
    started from.
    """
    monkeypatch.setattr(Reporter, "final_grid", no_grid)
    save_file(tensors, tmp_path / "model.safetensors")
    workdir, config = str(tmp_path / "run"), tiny_config()
    run_import(config, workdir, str(tmp_path / "model.safetensors"))
    imported, _ = read_workdir(workdir, config)
    assert imported.keys() == {"ema_params"}
    flags = ("checkpoint_every=1", "keep_checkpoints=9", "evaluation.kind=none")
    assert run(f"--workdir={workdir}", *(f"--config.{flag}" for flag in flags)) == 0
    assert re.search("imported with ema_params.*afresh", capsys.readouterr().out)
    first, last = (read_workdir(workdir, config, step)[0] for step in (1, 3))
    assert first["step"] == 1 and last["step"] == 3
    assert_same(first["params"], imported["ema_params"])
    same = jax.tree.map(np.array_equal, last["params"], first["params"])
    assert not jax.tree.all(same)


def test_training_goes_on_with_imported_moments(tensors, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Reporter, "final_grid", no_grid)
    torch.save(Trainer(tensors, "one group", steps=2).file(), tmp_path / "checkpoint.pth")
    workdir, flag = tmp_path / "run", "--config.evaluation.kind=none"
    run_import(tiny_config(flag), str(workdir), str(tmp_path / "checkpoint.pth"))
    assert run(f"--workdir={workdir}", flag) == 0
    output = capsys.readouterr().out.partition("complete")[0]
    assert "going on from step 2 of 3" in output and "afresh" not in output
    (record,) = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert record["step"] == 3 and record["learning_rate"] > 0, "the warm-up of two steps is over"
