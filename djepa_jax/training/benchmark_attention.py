"""Whether the implementations of attention agree: `--mode=benchmark --parts=attention`."""

import jax
import jax.numpy as jnp
import numpy as np

from djepa_jax.config.experiment import Experiment
from djepa_jax.core.models.attention import attend
from djepa_jax.training.benchmark_parity import judge

CASES = (("fused", 0.0), ("fused", 0.1), ("cudnn", 0.0))  # implementation, dropout
TOLERANCE = 2e-2  # of bfloat16 products


def check_attention(experiment: Experiment) -> dict:
    """Outputs and gradients on this device against those of "plain", in the model's shapes."""
    if jax.default_backend() != "gpu":
        return {"found": "skipped: fused and cudnn attention are for GPUs"}
    ours = {case: outputs(experiment, *case) for case in CASES}
    theirs = {(name, rate): outputs(experiment, "plain", rate) for name, rate in CASES}
    return judge(ours, theirs, TOLERANCE, "fused and cudnn attention and plain")


def outputs(experiment: Experiment, implementation: str, rate: float) -> tuple:
    """Output and gradients of one implementation for random arrays; some keys are hidden."""
    model = experiment.network
    places, width = model.num_prefix_tokens + model.num_tokens, model.width // model.num_heads
    shape = (4, 4, places, model.num_heads, width)
    q, k, v, weight = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16)
    mask = places - jnp.arange(4)  # [B], how many keys may be seen
    keys = jax.random.split(jax.random.key(0), 4) if rate else None  # [B]

    def weighted(q, k, v):
        how = {"mask": mask, "rate": rate, "keys": keys, "implementation": implementation}
        out = attend(q, k, v, **how).astype(jnp.float32)  # [B, S, H, d]
        return (out * weight).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients
