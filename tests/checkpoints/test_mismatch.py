"""The table of tensors that do not fit, and the flags it suggests; by shapes alone, so that sizes
cost nothing.
"""

import functools

import pytest
from conftest import load_parity
from flax import traverse_util
from official_files import without

from djepa_jax.checkpoints.convert.import_weights import LAYOUT, read_tensors
from djepa_jax.checkpoints.convert.mismatch import MismatchError, check_shapes, suggestions
from djepa_jax.checkpoints.convert.official import official_shapes
from djepa_jax.checkpoints.convert.tensor_files import StoredTensor
from djepa_jax.core.models.conditioning import Classes
from djepa_jax.core.models.djepa import SIZES, ModelConfig, split_model

SIZE_KEYS = {f"model.{key}" for key in SIZES["B"]}
LATENTS = dict(grid=(256,), token_dim=16, conditioner=Classes(1000), denoiser_out=32)


@functools.cache
def published(size: str = "B", **changes) -> tuple[ModelConfig, dict]:
    """A published model's config, perhaps changed, and the authors' names and shapes."""
    model = ModelConfig(**LATENTS | SIZES[size] | changes)
    return model, official_shapes(split_model(model)[1])


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
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {name: rest for name, *rest in cells}


def test_every_kind_of_mismatch_is_in_the_table():
    _, shapes = published()
    check_shapes(dict(reversed(shapes.items())), shapes, "the file")  # whatever their order
    odd = {"extra.weight": (3, 4), "z_proj.bias": (5,), "fake_latent": (), "\x1b[2J": (1,)}
    found = without(shapes, "mask_token") | odd
    assert rows(found, shapes) == {
        "mask_token": ["missing", "-", "(1, 1, 768)"],
        "extra.weight": ["surplus", "(3, 4)", "-"],
        "z_proj.bias": ["shape", "(5,)", "(768,)"],
        "fake_latent": ["shape", "()", "(1, 768)"],
        "\\x1b[2J": ["surplus", "(1,)", "-"],  # which a terminal would obey
    }


def test_layers_that_differ_alike_share_a_line():
    _, shapes = published()
    for layers, numbers in (
        ((7,), "7"),
        ((0, 1), "{0..1}"),
        (tuple(range(12)), "{0..11}"),
        ((1, 3, 8), "{1,3,8}"),
    ):
        gone = {f"encoder_blocks.{layer}.mlp.fc1.bias" for layer in layers}
        found = {name: shape for name, shape in shapes.items() if name not in gone}
        name = f"encoder_blocks.{numbers}.mlp.fc1.bias"
        assert rows(found, shapes) == {name: ["missing", "-", "(3072,)"]}
    odd = {f"encoder_blocks.{layer}.norm1.bias": (7 + layer // 5,) for layer in (3, 4, 5)}
    assert rows(shapes | odd, shapes) == {
        "encoder_blocks.{3..4}.norm1.bias": ["shape", "(7,)", "(768,)"],
        "encoder_blocks.5.norm1.bias": ["shape", "(8,)", "(768,)"],
    }


def test_table_of_another_size_stays_short():
    """H has more than a thousand tensors; people read this."""
    (_, found), (model, expected) = published("H"), published("B")
    lines = message(found, expected, model)
    names = {line.split()[0] for line in lines[2:]}
    assert len(found) > 1000 and len(lines) < 120
    assert "encoder_blocks.{12..31}.attn.qkv.weight" in names
    assert "diffloss.net.res_blocks.{6..11}.mlp.0.weight" in names


def test_published_sizes_are_recognised():
    for file in SIZES:
        for config in SIZES:
            (_, found), (model, expected) = published(file), published(config)
            flag = f"--config.model.size={file}"
            assert suggestions(found, model) == ([] if file == config else [flag])
            if file != config:
                line = message(found, expected, model)[1]
                assert line == f"The file is of a model with {flag}"


# what the file's model has in place of size B with 64 prefix tokens, 1000 classes, diffusion, and
# the keys that it asks for
HINTS = (
    (dict(width=384, num_heads=6), ["model.width=384", "model.num_heads=6"]),
    (
        dict(encoder_depth=3, predictor_depth=5),
        ["model.encoder_depth=3", "model.predictor_depth=5"],
    ),
    (
        dict(denoiser_depth=2, denoiser_width=96),
        ["model.denoiser_depth=2", "model.denoiser_width=96"],
    ),
    (dict(num_heads=24), ["model.num_heads=24"]),
    (dict(mlp_ratio=2.5), ["model.mlp_ratio=2.5"]),
    (dict(denoiser_out=16), ["loss.name=flow_matching"]),
    (dict(jepa_head=False), ["loss.jepa_weight=0.0"]),
    (dict(qk_norm=False), ["model.qk_norm=False"]),
    (dict(num_prefix_tokens=4), ["model.num_prefix_tokens=4"]),
    (dict(conditioner=Classes(10)), ["data.num_classes=10"]),
    (
        dict(denoiser_out=16, jepa_head=False, conditioner=Classes(10)),
        ["loss.name=flow_matching", "loss.jepa_weight=0.0", "data.num_classes=10"],
    ),
    (SIZES["L"] | dict(qk_norm=False), ["model.size=L", "model.qk_norm=False"]),
)


def test_flags_that_the_file_asks_for():
    """And that a file of size B asks for with the config of the other model."""
    model, expected = published()
    for changes, keys in HINTS:
        other, found = published(**changes)
        assert suggestions(found, model) == [f"--config.{key}" for key in keys]
        assert suggestions(found, other) == []
        asked = {flag.split("=")[0] for flag in suggestions(expected, other)}
        plain = {key.partition("=")[0] for key in keys}
        expected_keys = {"model.size" if key in SIZE_KEYS else key for key in plain}
        assert asked == {f"--config.{key}" for key in expected_keys}


def test_no_hints_where_no_flag_would_help():
    """A map of another size is one: how many tokens a side has cannot be told from their number."""
    model, expected = published()
    _, larger = published(grid=(1024,))
    foreign = {"conv1.weight": (64, 3, 7, 7), "encoder_blocks.x": (3,), "z_proj.weight": (8, 4)}
    for found in (larger, foreign, foreign | {"z_proj.weight": (8,)}):
        assert suggestions(found, model) == []
        assert message(found, expected, model)[1].split()[:2] == ["tensor", "problem"]


def hollow(shapes: dict) -> dict[str, StoredTensor]:
    """Tensors that may be asked for their shapes only."""
    return {name: StoredTensor(shape, "float32", lambda: 1 / 0) for name, shape in shapes.items()}


def test_tensors_are_checked_before_one_is_read():
    gauss = load_parity("gauss")
    theirs = {name: value.shape for name, value in gauss.tensors.items()}
    leaves = traverse_util.flatten_dict(gauss.abstract, sep="/")
    ours = {path: leaf.shape for path, leaf in leaves.items()}
    for shapes, metadata, gone in ((theirs, {}, "buffer"), (ours, LAYOUT, "predictor/mask_token")):
        with pytest.raises(ZeroDivisionError):
            read_tensors(hollow(shapes), metadata, gauss.abstract, "the file", gauss.config)
        with pytest.raises(MismatchError, match=rf"{gone} +missing"):
            some = hollow(without(shapes, gone))
            read_tensors(some, metadata, gauss.abstract, "the file", gauss.config)
