"""The table of tensors that do not fit, and the flags it suggests; by shapes alone, so that sizes
cost nothing.
"""

import dataclasses
import functools

import pytest
from conftest import load_parity
from flax import traverse_util
from official_files import renamed, without

from djepa_jax.checkpoints.convert.mismatch import MismatchError, check_shapes, suggestions
from djepa_jax.checkpoints.convert.official import official_shapes
from djepa_jax.checkpoints.convert.reading import LAYOUT, fit
from djepa_jax.checkpoints.convert.tensor_files import TensorInfo, Tensors
from djepa_jax.core.models.djepa import SIZES, ModelConfig, split_model

LATENTS = dict(num_tokens=256, token_dim=16, num_classes=1000, denoiser_out=32)


@functools.cache
def published(size: str) -> tuple[ModelConfig, dict]:
    """A published model's config, and the authors' names and shapes of its tensors."""
    model = ModelConfig(**LATENTS, **SIZES[size])
    return model, shapes_of(model)


def shapes_of(model: ModelConfig) -> dict:
    return official_shapes(split_model(model)[1])


def changed(size: str = "B", **changes) -> tuple[ModelConfig, dict]:
    """A model that differs from a published one."""
    model = dataclasses.replace(published(size)[0], **changes)
    return model, shapes_of(model)


def message(found: dict, expected: dict, model: ModelConfig | None = None) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(MismatchError) as caught:
        check_shapes(found, expected, "the file", model)
    return str(caught.value).splitlines()


def rows(found: dict, expected: dict) -> dict[str, list[str]]:
    """The table's lines by the tensor that they name, without spaces beside the words."""
    head, titles, *lines = message(found, expected)
    assert head == "the file does not fit the config; nothing was written."
    assert titles.split() == ["tensor", "problem", "in", "the", "file", "expected"]
    return {
        line.split()[0]: [cell.strip() for cell in line.split("  ") if cell.strip()][1:]
        for line in lines
    }


def test_tensors_that_fit_pass_whatever_their_order():
    for size in SIZES:
        model, shapes = published(size)
        check_shapes(dict(reversed(shapes.items())), shapes, "the file", model)


def test_every_kind_of_mismatch_is_in_the_table():
    _, shapes = published("B")
    found = without(shapes, "mask_token") | {
        "extra.weight": (3, 4),
        "z_proj.bias": (5,),
        "fake_latent": (),
    }
    assert rows(found, shapes) == {
        "mask_token": ["missing", "-", "(1, 1, 768)"],
        "extra.weight": ["surplus", "(3, 4)", "-"],
        "z_proj.bias": ["shape", "(5,)", "(768,)"],
        "fake_latent": ["shape", "()", "(1, 768)"],
    }


def test_columns_are_aligned():
    _, shapes = published("B")
    lines = message(without(shapes, "mask_token") | {"z_proj.bias": (5,)}, shapes)[1:]
    column = lines[0].index("expected")
    assert lines[1][column - 2 : column + 1] == "  (" and lines[2][column - 2 : column + 1] == "  ("


# layers that a file lacks -> how the table names them
RANGES = {
    (0,): "0",
    (7,): "7",
    (0, 1): "{0..1}",
    tuple(range(12)): "{0..11}",
    (0, 1, 2, 9, 10, 11): "{0..2,9..11}",
    (1, 3, 5): "{1,3,5}",
    (2, 3, 8): "{2..3,8}",
}


@pytest.mark.parametrize("layers", RANGES)
def test_layers_share_a_line(layers):
    _, shapes = published("B")
    gone = {f"encoder_blocks.{layer}.mlp.fc1.bias" for layer in layers}
    found = {name: shape for name, shape in shapes.items() if name not in gone}
    assert rows(found, shapes) == {
        f"encoder_blocks.{RANGES[layers]}.mlp.fc1.bias": ["missing", "-", "(3072,)"]
    }


def test_layers_that_differ_do_not_share_a_line():
    _, shapes = published("B")
    odd = {
        "encoder_blocks.3.norm1.bias": (7,),
        "encoder_blocks.4.norm1.bias": (7,),
        "encoder_blocks.5.norm1.bias": (8,),
    }
    assert rows(shapes | odd, shapes) == {
        "encoder_blocks.{3..4}.norm1.bias": ["shape", "(7,)", "(768,)"],
        "encoder_blocks.5.norm1.bias": ["shape", "(8,)", "(768,)"],
    }


def test_table_of_another_size_stays_short():
    """H has more than a thousand tensors; people read this."""
    (_, found), (model, expected) = published("H"), published("B")
    lines = message(found, expected, model)
    assert len(found) > 1000 and len(lines) < 120
    assert any(line.split()[0] == "encoder_blocks.{12..31}.attn.qkv.weight" for line in lines[2:])
    assert any(
        line.split()[0] == "diffloss.net.res_blocks.{6..11}.mlp.0.weight" for line in lines[2:]
    )


@pytest.mark.parametrize("file", SIZES)
@pytest.mark.parametrize("config", SIZES)
def test_published_size_is_recognised(file, config):
    (_, found), (model, expected) = published(file), published(config)
    flag = f"--config.model.size={file}"
    assert suggestions(found, model) == ([] if file == config else [flag])
    if file != config:
        assert message(found, expected, model)[1] == f"The file is of a model with {flag}"


# what the file's model has in place of size B with 64 prefix tokens, 1000 classes, diffusion ->
# flags that it asks for
HINTS = {
    "another width": (dict(width=384, num_heads=6), ["model.width=384", "model.num_heads=6"]),
    "other depths": (
        dict(encoder_depth=3, predictor_depth=5),
        ["model.encoder_depth=3", "model.predictor_depth=5"],
    ),
    "another denoiser": (
        dict(denoiser_depth=2, denoiser_width=96),
        ["model.denoiser_depth=2", "model.denoiser_width=96"],
    ),
    "more heads": (dict(num_heads=24), ["model.num_heads=24"]),
    "the other loss": (dict(denoiser_out=16), ["loss.name=flow_matching"]),
    "no JEPA head": (dict(jepa_head=False), ["loss.jepa_weight=0.0"]),
    "no QK norm": (dict(qk_norm=False), ["model.qk_norm=False"]),
    "fewer prefix tokens": (dict(num_prefix_tokens=4), ["model.num_prefix_tokens=4"]),
    "fewer classes": (dict(num_classes=10), ["data.num_classes=10"]),
    "several at once": (
        dict(denoiser_out=16, jepa_head=False, num_classes=10),
        ["loss.name=flow_matching", "loss.jepa_weight=0.0", "data.num_classes=10"],
    ),
    "a size without QK norm": (
        SIZES["L"] | dict(qk_norm=False),
        ["model.size=L", "model.qk_norm=False"],
    ),
}


@pytest.mark.parametrize("case", HINTS)
def test_flags_that_the_file_asks_for(case):
    changes, flags = HINTS[case]
    model, _ = published("B")
    other, found = changed(**changes)
    assert suggestions(found, model) == [f"--config.{flag}" for flag in flags]
    assert suggestions(found, other) == [], (
        "the config that the flags describe asks for nothing more"
    )


@pytest.mark.parametrize("case", HINTS)
def test_hints_the_other_way(case):
    """A file of size B, read with the config of the other model, asks for what size B has."""
    other, expected = changed(**HINTS[case][0])
    _, found = published("B")
    keys = {flag.split("=")[0].removeprefix("--config.") for flag in suggestions(found, other)}
    asked = {flag.split("=")[0] for flag in HINTS[case][1]}
    is_size = any(
        key in asked
        for key in ("model.width", "model.encoder_depth", "model.denoiser_depth", "model.num_heads")
    )
    assert keys == ({"model.size"} if is_size else asked)
    assert message(found, expected, other)[1].startswith("The file is of a model with --config.")


def test_differences_that_no_flag_explains_give_the_table_alone():
    """A map of another size is one: how many tokens a side has cannot be told from their number and
    patch size.
    """
    model, expected = published("B")
    _, found = changed(num_tokens=1024)
    assert suggestions(found, model) == []
    assert message(found, expected, model)[1].split()[:2] == ["tensor", "problem"]


def test_file_of_something_else_gets_no_wrong_hints():
    model, expected = published("B")
    lines = message({"conv1.weight": (64, 3, 7, 7), "fc.bias": (1000,)}, expected, model)
    assert lines[1].split()[:2] == ["tensor", "problem"]
    assert any(line.split()[:2] == ["conv1.weight", "surplus"] for line in lines)


def hollow(shapes: dict) -> Tensors:
    """Tensors that may be asked for their shapes only."""

    def reopen():
        raise AssertionError("checked before anything is read")

    return Tensors({name: TensorInfo(shape, "float32") for name, shape in shapes.items()}, reopen)


def test_check_reads_no_tensor():
    gauss = load_parity("gauss")
    shapes = {name: value.shape for name, value in gauss.tensors.items()}
    assert (
        fit(hollow(shapes), {}, gauss.abstract, "the file", gauss.config).tensors.shapes == shapes
    )
    with pytest.raises(MismatchError, match="the file does not fit"):
        fit(hollow(without(shapes, "buffer")), {}, gauss.abstract, "the file", gauss.config)


def test_file_in_our_layout_is_checked_by_our_names():
    gauss = load_parity("gauss")
    shapes = {
        path: leaf.shape
        for path, leaf in traverse_util.flatten_dict(gauss.abstract, sep="/").items()
    }
    assert (
        fit(hollow(shapes), LAYOUT, gauss.abstract, "the file", gauss.config).tensors.shapes
        == shapes
    )
    del shapes["predictor/mask_token"]
    with pytest.raises(MismatchError, match=r"predictor/mask_token +missing +- +\(48,\)"):
        fit(hollow(shapes), LAYOUT, gauss.abstract, "the file", gauss.config)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefix_of_every_name_is_taken_off(prefix):
    gauss = load_parity("gauss")
    shapes = {name: value.shape for name, value in gauss.tensors.items()}
    weights = fit(hollow(renamed(shapes, prefix)), {}, gauss.abstract, "the file", gauss.config)
    assert weights.tensors.shapes == shapes
    with pytest.raises(MismatchError, match=f"{prefix}buffer +surplus"):
        some = renamed({"buffer": shapes["buffer"]}, prefix) | without(shapes, "buffer")
        fit(hollow(some), {}, gauss.abstract, "the file", gauss.config)
