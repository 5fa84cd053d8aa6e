"""Training goes on from an import: the moments of PyTorch's AdamW, and starts without them."""

import copy
import functools
import json

import jax
import numpy as np
import optax
import pytest
import torch
from conftest import assert_close, load_parity
from official_files import assert_same, flags_of, read_workdir, run_import, training_file
from safetensors.numpy import load_file
from tiny import CONFIG, TINY

from djepa_jax import main as cli
from djepa_jax.checkpoints.convert.official import from_official, to_official
from djepa_jax.core.optimizer import OptimizerConfig, decay_mask, make_optimizer

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
def test_the_next_update_is_the_one_that_pytorch_makes(gauss, grouping, tmp_path, capsys):
    trainer = Trainer(gauss.tensors, grouping)
    torch.save(trainer.file(), tmp_path / "checkpoint.pth")
    assert run_import(tmp_path / "checkpoint.pth", tmp_path / "run", flags_of(gauss)) == 0
    assert (
        f"optimiser: its moments, from step {STEPS}, where training goes on"
        in capsys.readouterr().out
    )
    parts, step = read_workdir(tmp_path / "run", flags_of(gauss))
    assert step == parts["step"] == STEPS and parts["skipped_steps"] == parts["bad_streak"] == 0
    (adam,) = [s for s in jax.tree.leaves(parts["opt_state"], is_leaf=is_adam) if is_adam(s)]
    state = trainer.optimizer.state
    assert adam.count == STEPS
    assert all(leaf == STEPS for leaf in jax.tree.leaves(parts["opt_state"]) if leaf.ndim == 0), (
        "counters of schedules too"
    )
    assert_same(to_official(adam.mu), trainer.numpy(lambda p: state[p]["exp_avg"]))
    assert_same(to_official(adam.nu), trainer.numpy(lambda p: state[p]["exp_avg_sq"]))

    trainer.step(STEPS)
    config = OptimizerConfig(LEARNING_RATE, num_steps=10, weight_decay=trainer.decay, clip_norm=1e9)
    gradients = from_official(
        {name: values[STEPS] for name, values in trainer.gradients.items()}, gauss.abstract
    )
    updates, _ = jax.jit(make_optimizer(config).update)(
        gradients, parts["opt_state"], parts["params"]
    )
    ours = to_official(optax.apply_updates(parts["params"], updates))
    for name, expected in trainer.numpy(lambda p: p).items():
        assert_close(ours[name], expected, SAME_UPDATE)


def is_adam(node) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _one_parameter_less(state: dict) -> None:
    del state["param_groups"][1]["params"][-1]


def _parameters_numbered_backwards(state: dict) -> None:
    for group in state["param_groups"]:
        group["params"] = group["params"][::-1]


def _groups_of_other_sizes(state: dict) -> None:
    first, second = (group["params"] for group in state["param_groups"])
    second.insert(0, first.pop())


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
    _groups_of_other_sizes: "numbered in an unknown way",
    _moments_of_another_shape: "numbered in an unknown way",
    _moments_not_finite: "not finite",
    _not_adam: "",
    _no_step_made: "",
}


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(load_parity("gauss").tensors, "the authors' two groups")


@pytest.mark.parametrize("spoil", UNMATCHED)
def test_moments_that_cannot_be_matched_are_left_out(gauss, trainer, spoil, tmp_path, capsys):
    state = copy.deepcopy(trainer.optimizer.state_dict())
    spoil(state)
    torch.save(trainer.file(state), tmp_path / "checkpoint.pth")
    assert run_import(tmp_path / "checkpoint.pth", tmp_path / "run", flags_of(gauss)) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("optimiser: ")
    ]
    assert (
        line.startswith("optimiser: none; training starts it afresh, from step 0 with warm-up")
        and UNMATCHED[spoil] in line
    )
    parts, step = read_workdir(tmp_path / "run", flags_of(gauss))
    assert step == 0 and parts.keys() == {"params", "ema_params"}
    assert_same(to_official(parts["params"]), trainer.numpy(lambda p: p))


@pytest.fixture(scope="module")
def tiny_import(trained, tmp_path_factory):
    """A tiny trained model, written as the authors would write it and imported again."""
    folder = tmp_path_factory.mktemp("tiny")
    export = [
        "djepa_jax",
        "--mode=export",
        f"--workdir={trained}",
        f"--out={folder / 'export'}",
        "--format=official",
    ]
    assert cli.main(export) == 0
    workdir = folder / "run"
    assert (
        run_import(folder / "export" / "model.safetensors", workdir, [f"--config={CONFIG}", *TINY])
        == 0
    )
    return workdir


def test_samples_of_an_import_are_those_of_its_source(trained, tiny_import, tmp_path):
    images = []
    for workdir in (trained, tiny_import):
        command = [
            "djepa_jax",
            f"--config={CONFIG}",
            "--mode=sample",
            f"--workdir={workdir}",
            f"--out={tmp_path / 'a.npz'}",
        ]
        assert cli.main([*command, *TINY]) == 0
        images.append(np.load(tmp_path / "a.npz")["arr_0"])
    np.testing.assert_array_equal(*images)


def test_training_goes_on_from_imported_weights(trained, tiny_import, capsys):
    """The first update of the warm-up has learning rate 0, so what it leaves is what training
    started from.
    """
    flags = [f"--config={CONFIG}", *TINY]
    imported, _ = read_workdir(tiny_import, flags)
    assert imported.keys() == {"ema_params"}
    every_step = (
        "--config.checkpoint_every=1",
        "--config.keep_checkpoints=9",
        "--config.evaluation.kind=none",
    )
    assert cli.main(["djepa_jax", f"--workdir={tiny_import}", *flags, *every_step]) == 0
    assert (
        "imported with ema_params; the rest of the training state starts afresh"
        in capsys.readouterr().out
    )
    first, last = (read_workdir(tiny_import, flags, step)[0] for step in (1, 3))
    assert first["step"] == 1 and last["step"] == 3
    assert_same(first["params"], imported["ema_params"])
    assert optax.tree.norm(optax.tree.sub(last["params"], first["params"])) > 0


def test_training_goes_on_with_imported_moments(tiny_import, tmp_path, capsys):
    tensors = load_file(tiny_import.parent / "export" / "model.safetensors")
    torch.save(Trainer(tensors, "one group", steps=2).file(), tmp_path / "checkpoint.pth")
    workdir, flags = (
        tmp_path / "run",
        [f"--config={CONFIG}", *TINY, "--config.evaluation.kind=none"],
    )
    assert run_import(tmp_path / "checkpoint.pth", workdir, flags) == 0
    assert cli.main(["djepa_jax", f"--workdir={workdir}", *flags]) == 0
    output = capsys.readouterr().out
    assert (
        "going on from step 2 of 3" in output
        and "afresh" not in output.partition("going on")[2].partition("complete")[0]
    )
    (record,) = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert record["step"] == 3 and record["learning_rate"] > 0, "the warm-up of two steps is over"
