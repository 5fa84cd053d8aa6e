"""What a training step needs on each device, told before the first step.

The state (parameters, moving average, optimiser) follows exactly from shapes and shardings. What
the step itself needs on top, its batch, activations, gradients and work space, is XLA's own plan of
the compiled step; before compiling, or where a backend gives no plan, it is a closed form, good to
a factor of 2. Not counted: batches that wait on the device, a device-resident latent cache, and
what sampling needs between steps.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from djepa_jax.core import sharding
from djepa_jax.core.train_step import TrainSpec
from djepa_jax.runtime.progress import format_bytes

# What a layer keeps for its backward pass, per token: numbers of its width, and copies of the
# attention weights.
# Fitted to XLA's plans on the CPU; tests/test_memory.py holds the result to a factor of 2.
KEPT_PER_LAYER = {"none": (36, 5), "dots": (9, 0), "full": (1, 0)}
KEPT_PER_BLOCK = {"none": 12, "dots": 7, "full": 3}  # of a block of the denoiser, per row


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device; `step` is None where nothing is known, `limit` where the device does not
    tell.
    """

    parameters: int
    moving_average: int
    optimiser: int
    step: int | None  # on top of the state: batch, activations, gradients, work space
    limit: int | None
    estimated: bool  # `step` is the closed form, not XLA's plan

    @property
    def state(self) -> int:
        """What stays between steps."""
        return self.parameters + self.moving_average + self.optimiser

    @property
    def total(self) -> int:
        """State and step together, as far as known."""
        return self.state + (self.step or 0)


def memory_plan(
    abstract, shardings, compiled=None, spec: TrainSpec | None = None, limit: int | None = None
) -> MemoryPlan:
    """Where the memory of a device goes.

    Args:
        abstract: shapes of a `TrainState`.
        shardings: their `NamedSharding`s.
        compiled: the compiled training step.
        spec: the step's settings, for an estimate where XLA's plan is not to be had.
        limit: bytes of a device, in place of what it says itself.
    """
    parts = [
        bytes_per_device(getattr(abstract, name), getattr(shardings, name))
        for name in ("params", "ema_params", "opt_state")
    ]
    peak = compiled and planned_peak(compiled)
    step = peak - sum(parts) if peak else None
    if step is None and spec is not None:
        devices = sharding.batch_divisor(jax.tree.leaves(shardings)[0].mesh)
        copies = 1 if spec.microbatches == 1 else 2  # of the gradients: the part's, and their sum
        step = estimate_activations(spec, devices) + copies * parts[0]
    return MemoryPlan(
        *parts, step, device_limit() if limit is None else limit, not peak and step is not None
    )


def bytes_per_device(abstract, shardings) -> int:
    """Bytes that one device holds of a tree of arrays."""

    def held(leaf, place):
        return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(held, abstract, shardings)))


def planned_peak(compiled) -> int | None:
    """Bytes per device that XLA plans for a program, its arguments included; None where it does not
    say.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    kinds = ("argument", "output", "temp", "generated_code")
    return sum(getattr(plan, f"{kind}_size_in_bytes") for kind in kinds) - plan.alias_size_in_bytes


def device_limit() -> int | None:
    """Bytes that this process may use on a device; None where the device does not tell, as the
    CPU.
    """
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def estimate_activations(spec: TrainSpec, devices: int) -> int:
    """What one microbatch keeps for its backward pass on each of `devices` that share the batch.

    images x (layers x tokens x (a width + b heads tokens) + denoiser rows x blocks x c width) x
    bytes of a number; a and b follow from `model.remat`, which also has one layer at a time
    computed again. Context encoder and predictor count; the target encoder keeps nothing.
    """
    model, plan = spec.model, spec.plan
    context, predictor = (n + model.num_prefix_tokens for n in (plan.max_visible, plan.num_tokens))

    def layer(tokens, remat):
        of_width, of_weights = KEPT_PER_LAYER[remat]
        return tokens * (of_width * model.width + of_weights * model.num_heads * tokens)

    kept = model.encoder_depth * layer(context, model.remat) + model.predictor_depth * layer(
        predictor, model.remat
    )
    if model.remat != "none":
        kept += layer(predictor, "none")
    rows = plan.packed_rows / plan.chunk_size * spec.token_loss.noise_multiplicity
    kept += rows * (model.denoiser_depth + 1) * KEPT_PER_BLOCK[model.remat] * model.denoiser_width
    images = plan.batch_size / spec.microbatches / devices
    return int(images * kept * jnp.dtype(model.compute_dtype).itemsize)


def describe(plan: MemoryPlan, choosing: bool = False) -> str:
    """The plan in a line for people, and a second one with a remedy where it exceeds the device.

    With `choosing` the number of parts is found out by trying, and is no remedy.
    """
    parts = {
        "parameters": plan.parameters,
        "moving average": plan.moving_average,
        "optimiser": plan.optimiser,
    }
    if plan.step is not None:
        parts["step, roughly" if plan.estimated else "step (batch, activations, gradients)"] = (
            plan.step
        )
    text = "memory per device: " + ", ".join(
        f"{name} {format_bytes(size)}" for name, size in parts.items()
    )
    text += f"; together {format_bytes(plan.total)}"
    if plan.limit is None:
        return text
    text += f" of {format_bytes(plan.limit)}"
    if plan.total <= plan.limit:
        return text
    if plan.state > plan.limit:
        return (
            f"{text}\nthe training state alone does not fit: split it over devices with "
            "config.mesh=(1,-1,1)"
        )
    return (
        f"{text}\nthis may not fit: "
        f"{'' if choosing else 'raise config.microbatches (same result), '}set config.model.remat "
        "to "
        "dots or full (same result), split the state over devices with config.mesh=(1,-1,1), or "
        "lower config.batch_size"
    )
