"""Floating-point operations of D-JEPA, counted by hand: the yardstick for benchmarks and for scan
segments.

One multiply-add is two operations; matrix products only; a backward pass costs twice the forward
one. "Ideal" means that nothing is computed that is not used: no padding, no recomputation.
`count_products` counts what a traced program does and so checks the formulas.
"""

import math

from jax.extend import core

from djepa_jax.core.losses.base import TokenLoss
from djepa_jax.core.masking import MaskingConfig
from djepa_jax.core.models.djepa import ModelConfig
from djepa_jax.core.schedules import reveal_counts

TIME_FEATURES = 256

# Dense bfloat16 peak, FLOP/s, by a part of the name that JAX gives the device (vendors' data
# sheets); first match wins.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def trunk(
    width: int, depth: int, mlp_ratio: float, tokens: float, queries: float | None = None
) -> float:
    """Forward pass of one ViT over `tokens`; with `queries` the last layer computes only that many
    places.
    """
    per_query = (4 + 4 * mlp_ratio) * width**2  # q, output projection, MLP
    per_key = 4 * width**2  # k, v

    def layer(q):
        return per_query * q + per_key * tokens + 4 * q * tokens * width

    return (depth - 1) * layer(tokens) + layer(tokens if queries is None else queries)


def denoiser_row(model: ModelConfig) -> dict[str, float]:
    """Forward pass of one denoiser row by what it depends on: time, condition, or both with the
    noisy token.
    """
    width = model.denoiser_width
    return dict(
        time=2 * (TIME_FEATURES * width + width**2),
        condition=2 * model.width * width,
        rest=2
        * (
            model.denoiser_depth * 5 * width**2
            + 2 * width**2
            + (model.token_dim + model.denoiser_out) * width
        ),
    )


def train_image(
    model: ModelConfig,
    masking: MaskingConfig,
    noise_multiplicity: int,
    padded: bool = False,
    time_rows: float = 0.0,
) -> float:
    """One training image, forward and backward.

    Ideal by default: mean numbers of visible and masked tokens, and the last layers at masked
    places only. `padded` counts what the step really runs: V visible places, packed rows, whole
    last layers; but not what `model.remat` computes again. `time_rows` is the number of time
    embeddings per image, see there.
    """
    n, p = model.num_tokens, model.num_prefix_tokens
    masked = masking.packed_rows / masking.pack_size if padded else mean_masked(masking)
    visible = masking.max_visible if padded else n - masked
    queries = None if padded else masked
    row = denoiser_row(model)

    def vit(depth, tokens, wanted=None):
        return trunk(model.width, depth, model.mlp_ratio, tokens, wanted)

    inputs = 2 * model.token_dim * model.width * visible + 2 * model.width**2 * (p + visible)
    denoiser = (
        masked * (noise_multiplicity * row["rest"] + row["condition"]) + time_rows * row["time"]
    )
    context, predictor = (
        vit(model.encoder_depth, p + visible),
        vit(model.predictor_depth, p + n, queries),
    )
    if not model.jepa_head:
        return 3 * (context + predictor + inputs + denoiser)
    target = vit(model.encoder_depth, p + n, queries) + 2 * model.token_dim * model.width * n
    return 3 * (context + predictor + inputs + denoiser + 16 * model.width**2 * masked) + target


def time_rows(token_loss: TokenLoss, masking: MaskingConfig, padded: bool = False) -> float:
    """Time embeddings per training image.

    With continuous times (flow matching) every row has its own. Diffusion looks up a table of all
    its steps, made once per batch: a fraction of it per image, and none of it in the ideal count.
    """
    if not token_loss.time_table_size:
        masked = masking.packed_rows / masking.pack_size if padded else mean_masked(masking)
        return masked * token_loss.noise_multiplicity
    return token_loss.time_table_size / masking.batch_size if padded else 0.0


def mean_masked(masking: MaskingConfig, points: int = 4096) -> float:
    """Mean number of masked tokens under the mask ratios."""
    return sum(masking.masked_at((i + 0.5) / points) for i in range(points)) / points


def ar_step(model: ModelConfig, visible: float, new: float, denoiser_calls: int) -> float:
    """One autoregressive step of one image: encoder on `visible`, predictor for `new` places,
    denoiser on them.

    Once per sample: guidance doubles it. Time embeddings, which the whole batch shares, are left
    out.
    """
    row = denoiser_row(model)
    p = model.num_prefix_tokens
    encoder = trunk(model.width, model.encoder_depth, model.mlp_ratio, p + visible)
    predictor = trunk(
        model.width, model.predictor_depth, model.mlp_ratio, p + model.num_tokens, new
    )
    inputs = 2 * model.token_dim * model.width * visible + 2 * model.width**2 * (p + visible)
    return encoder + predictor + inputs + new * (denoiser_calls * row["rest"] + row["condition"])


def sample_image(model: ModelConfig, num_ar_steps: int, denoiser_calls: int, guided: bool) -> float:
    """One sampled image with exact shapes."""
    total, visible = 0.0, 0
    for new in reveal_counts(model.num_tokens, num_ar_steps):
        total += ar_step(model, visible, new, denoiser_calls)
        visible += new
    return total * (2 if guided else 1)


def padded_sample_image(model: ModelConfig, segments, denoiser_calls: int, guided: bool) -> float:
    """One sampled image with the padded shapes of `segments` (`sampler.plan_segments`)."""
    total = sum(
        ar_step(model, s.visible, s.new, denoiser_calls) * (s.stop - s.start) for s in segments
    )
    return total * (2 if guided else 1)


def count_products(jaxpr: core.Jaxpr) -> float:
    """Matrix products of a traced program, over all devices; the body of a scan counts as often as
    it runs.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += (
                2
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(left[axis] for axis in contracted)
            )
        inner = sum(count_products(sub) for sub in core.jaxprs_in_params(equation.params))
        total += inner * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return total
