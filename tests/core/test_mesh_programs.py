"""What the compiled training step does on each mesh, and that the published sizes place without
remainder.

That all meshes give the same losses is in `test_train.py`; here eight CPU devices only compile,
nothing runs.
"""

import math
import re

import jax
import pytest
from jax.sharding import AbstractMesh
from tiny import load_config, tiny_config

from djepa_jax.core import sharding
from djepa_jax.core.sharding import path_name
from djepa_jax.core.train_step import make_train_step, state_shapes

WIDTH, HEADS, BATCH, TOKENS, PREFIX = (
    256,
    4,
    256,
    16,
    4,
)  # 8 packs of 32 images, so that each device can have its own
DENOISER, DRAWS = 64, 2  # width, and draws of noise per token
MODEL = (
    f"--config.batch_size={BATCH}",
    f"--config.model.width={WIDTH}",
    f"--config.model.num_heads={HEADS}",
    f"--config.model.num_prefix_tokens={PREFIX}",
    f"--config.model.denoiser_width={DENOISER}",
    f"--config.loss.noise_multiplicity={DRAWS}",
)
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}  # machine code is not looked at

DEVICES = {
    1: [(1, 1, 1)],
    8: [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)],
    256: [(256, 1, 1), (1, 256, 1), (8, 32, 1), (16, 4, 4), (1, 64, 4)],
}
VECTORS = re.compile(r"(bias|scale|mask_token|null)$")  # too small to be worth the messages
SPLIT_BY_TENSOR = re.compile(
    r"(attention/(qkv|out)|mlp/(up|down)|jepa_head/(up|down)|denoiser/blocks/(up|down))/kernel$"
)
BIASES_SPLIT_BY_TENSOR = re.compile(r"(attention/qkv|mlp/up|jepa_head/up|denoiser/blocks/up)/bias$")


class Program:
    """The training step compiled for a mesh."""

    def __init__(self, mesh_shape):
        spec = tiny_config(*MODEL).train
        self.rows = spec.masking.packed_rows  # of the denoiser, per pack
        mesh = sharding.make_mesh(mesh_shape)
        self.abstract = state_shapes(spec)
        self.shardings = sharding.state_shardings(self.abstract, mesh)
        place = sharding.batch_sharding(mesh)
        batch = {"example": jax.ShapeDtypeStruct((BATCH, 8, 8, 1), "uint8", sharding=place)}
        batch["condition"] = jax.ShapeDtypeStruct((BATCH,), "int32", sharding=place)
        state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract,
            self.shardings,
        )
        step = jax.jit(
            make_train_step(spec), donate_argnums=0, out_shardings=(self.shardings, None)
        )
        compiled = step.lower(state, batch).compile(compiler_options=QUICK)
        self.text, self.memory = compiled.as_text(), compiled.memory_analysis()

    def results(self, operation: str) -> list[tuple[str, tuple[int, ...]]]:
        """Type and shape of every array that a kind of operation makes, per device."""
        lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", self.text)
        arrays = [array for line in lines for array in re.findall(r"(\w+)\[([\d,]*)\]", line)]
        return [(kind, tuple(int(n) for n in shape.split(",") if n)) for kind, shape in arrays]

    def holds(self, *shape: int) -> bool:
        """Whether an array of this shape appears on a device."""
        return f"[{','.join(map(str, shape))}]" in self.text


@pytest.fixture(scope="module")
def data_parallel():
    return Program((8, 1, 1))


@pytest.fixture(scope="module")
def fsdp():
    return Program((1, 8, 1))


@pytest.fixture(scope="module")
def tensor_parallel():
    return Program((4, 1, 2))


def number_of_parameters(program) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(program.abstract.params))


def gathered_kernels(program) -> list[tuple[int, ...]]:
    """Gathers that put together a kernel, or one layer of stacked ones."""
    leaves = jax.tree_util.tree_leaves_with_path(program.abstract.params)
    shapes = [leaf.shape for path, leaf in leaves if path_name(path).endswith("kernel")]
    shapes = {tuple(n for n in part if n != 1) for shape in shapes for part in (shape, shape[1:])}
    gathered = [tuple(n for n in shape if n != 1) for _, shape in program.results("all-gather")]
    return [shape for shape in gathered if shape in shapes and len(shape) > 1]


def test_data_parallel_computes_its_share_and_sums_every_gradient_once(data_parallel):
    assert data_parallel.results("all-gather") == data_parallel.results("all-to-all") == []
    reduced = data_parallel.results("all-reduce")
    summed = sum(math.prod(shape) for kind, shape in reduced if kind == "f32")
    assert 1 <= summed / number_of_parameters(data_parallel) < 1.1
    tokens, images = TOKENS + PREFIX, BATCH // 8
    assert data_parallel.holds(images, HEADS, tokens, tokens)
    assert not data_parallel.holds(BATCH, HEADS, tokens, tokens)


def test_fsdp_holds_its_share_of_the_state(fsdp):
    leaves = jax.tree.leaves(fsdp.abstract)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    places = zip(leaves, jax.tree.leaves(fsdp.shardings), strict=True)
    share = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in places)
    state = fsdp.memory.argument_size_in_bytes - BATCH * (8 * 8 + 4) / 8
    assert 1 <= state / (whole / 8) < 1.05
    assert state == share == fsdp.memory.alias_size_in_bytes, "the new state replaces the old"


def test_fsdp_gathers_kernels_and_splits_activations_as_data_parallel_does(fsdp, data_parallel):
    """Else the compiler gathers the whole batch on every device, rather than a layer's kernels."""
    assert gathered_kernels(fsdp)
    assert fsdp.memory.temp_size_in_bytes < 1.5 * data_parallel.memory.temp_size_in_bytes
    tokens = TOKENS + PREFIX
    assert fsdp.holds(BATCH // 8 * tokens, 4 * WIDTH) and not fsdp.holds(BATCH * tokens, 4 * WIDTH)


def test_fsdp_exchanges_no_rows_of_the_denoiser(fsdp):
    """They are many, its kernels are small; yet the compiler splits rows by width where it may."""
    rows = {fsdp.rows, DRAWS * fsdp.rows}
    assert fsdp.holds(1, fsdp.rows, DRAWS, DENOISER), "a pack for each device, at full width"
    for operation in ("all-gather", "all-reduce", "all-to-all", "reduce-scatter"):
        assert [shape for _, shape in fsdp.results(operation) if rows & set(shape)] == []


def test_tensor_parallel_splits_heads_and_mlp(tensor_parallel):
    images, tokens = BATCH // 4, TOKENS + PREFIX
    rows = images * tokens
    assert tensor_parallel.holds(images, HEADS // 2, tokens, tokens), (
        "attention weights of half of the heads"
    )
    assert not tensor_parallel.holds(images, HEADS, tokens, tokens)
    width = WIDTH // HEADS
    assert tensor_parallel.holds(images, tokens, HEADS // 2, width), "queries"
    assert not tensor_parallel.holds(images, tokens, HEADS, width)
    assert tensor_parallel.holds(rows, 2 * WIDTH) and not tensor_parallel.holds(rows, 4 * WIDTH)
    assert not gathered_kernels(tensor_parallel)


@pytest.mark.parametrize("name", ["b", "l", "h"])
def test_published_sizes_place_without_remainder(name):
    experiment = load_config(f"djepa_{name}")
    abstract = state_shapes(experiment.train)
    for devices, shape in ((n, shape) for n, shapes in DEVICES.items() for shape in shapes):
        _, fsdp, tensor = shape
        mesh = AbstractMesh(shape, sharding.MESH_AXES)
        assert mesh.size == devices and experiment.batch_size % sharding.batch_divisor(mesh) == 0
        assert experiment.train.model.num_heads % tensor == 0
        shardings = sharding.state_shardings(abstract, mesh)
        leaves = jax.tree_util.tree_leaves_with_path(abstract)
        for (path, leaf), place in zip(leaves, jax.tree.leaves(shardings), strict=True):
            path = path_name(path)
            parts = 1 if leaf.ndim == 0 or VECTORS.search(path) else fsdp
            if SPLIT_BY_TENSOR.search(path) or BIASES_SPLIT_BY_TENSOR.search(path):
                parts *= tensor
            assert math.prod(place.shard_shape(leaf.shape)) * parts == leaf.size, (
                path,
                leaf.shape,
                place.spec,
                shape,
            )
        blocks = shardings.params["predictor"]["stack"]["blocks"]
        specs = [place.spec for place in jax.tree.leaves(blocks)]
        assert all(not spec or spec[0] is None for spec in specs), "the layer axis is never split"
