"""Floating-point operations of D-JEPA, counted by hand: the yardstick of benchmarks and segments.

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

# Dense bfloat16 peak, FLOP/s (data sheets), by a part of JAX's device name; first match wins.
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
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 peak of a device, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)


def trunk(width: int, depth: int, mlp_ratio: float, tokens: float, queries=None) -> float:
    """Forward pass of one ViT over `tokens`; the last layer computes only `queries` of them."""
    per_query = (4 + 4 * mlp_ratio) * width**2  # q, output projection, MLP
    per_key = 4 * width**2  # k, v

    def layer(q):
        return per_query * q + per_key * tokens + 4 * q * tokens * width

    return (depth - 1) * layer(tokens) + layer(tokens if queries is None else queries)


def networks(model: ModelConfig, visible: float, queries: float | None) -> float:
    """Context encoder on `visible` tokens and predictor, with the projections in front of both."""
    width = model.width
    seen = model.num_prefix_tokens + visible
    places = model.num_prefix_tokens + model.num_tokens
    encoder = trunk(width, model.encoder_depth, model.mlp_ratio, seen)
    predictor = trunk(width, model.predictor_depth, model.mlp_ratio, places, queries)
    return encoder + predictor + (2 * model.token_dim * width * visible + 2 * width**2 * seen)


def denoiser_row(model: ModelConfig) -> dict[str, float]:
    """Forward pass of a denoiser row, by what it depends on; `rest` needs the noisy token."""
    width = model.denoiser_width
    hidden = model.denoiser_depth * 5 * width**2 + 2 * width**2
    return dict(
        time=2 * (TIME_FEATURES * width + width**2),
        condition=2 * model.width * width,
        rest=2 * (hidden + (model.token_dim + model.denoiser_out) * width),
    )


def train_image(
    model: ModelConfig,
    masking: MaskingConfig,
    noise_multiplicity,
    padded=False,
    time_rows=0.0,
    further=0.0,
) -> float:
    """One training image, forward and backward, with all parts trained.

    Ideal by default: mean numbers of visible and masked tokens, and the last layers at masked
    places only. `padded` counts what the step really runs: visible tokens padded to
    `masking.lengths`, packed rows, whole last layers; but not what `model.remat` computes again.
    `time_rows` is the number of time embeddings per image, see there, and `further` what
    `further_work` gives.
    """
    masked = masked_rows(masking, padded)
    queries = None if padded else masked
    parts = masking.lengths if padded else ((masking.pack_size, model.num_tokens - masked),)
    shown = sum(n * networks(model, visible, queries) for n, visible in parts) / masking.pack_size
    row = denoiser_row(model)
    per_token = noise_multiplicity * row["rest"] + row["condition"]
    trained = shown + masked * per_token + time_rows * row["time"]
    if not model.jepa_head:
        return 3 * trained + further
    places = model.num_prefix_tokens + model.num_tokens
    target = trunk(model.width, model.encoder_depth, model.mlp_ratio, places, queries)
    target += 2 * model.token_dim * model.width * model.num_tokens
    return 3 * (trained + 16 * model.width**2 * masked) + target + further


def masked_rows(masking: MaskingConfig, padded: bool) -> float:
    """Masked tokens per image, with `padded` all rows that the losses see."""
    return masking.packed_rows / masking.pack_size if padded else mean_masked(masking)


def time_rows(token_loss: TokenLoss, masking: MaskingConfig, padded: bool = False) -> float:
    """Time embeddings per training image.

    With continuous times (flow matching) every row has its own, or several. Diffusion looks up a
    table of all its steps, made once per batch: a fraction of it per image, and none of it in the
    ideal count.
    """
    if not token_loss.time_table_size:
        draws = token_loss.noise_multiplicity * getattr(token_loss, "times_per_call", 1)
        return masked_rows(masking, padded) * draws
    return token_loss.time_table_size / masking.batch_size if padded else 0.0


def further_work(
    model: ModelConfig, masking: MaskingConfig, token_loss: TokenLoss, padded: bool = False
) -> float:
    """What a training image costs once: a shortcut's targets, which have no gradient.

    With `padded` also the gradient of a table of times, a product (`look_up`).
    """
    draws = masked_rows(masking, padded) * token_loss.noise_multiplicity
    row = denoiser_row(model)
    call = row["rest"] + getattr(token_loss, "times_per_call", 1) * row["time"]
    work = draws * getattr(token_loss, "target_calls", 0) * call
    if padded:
        work += draws * 2 * token_loss.time_table_size * model.denoiser_width
    return work


def mean_masked(masking: MaskingConfig, points: int = 4096) -> float:
    """Mean number of masked tokens under the mask ratios."""
    return sum(masking.masked_at((i + 0.5) / points) for i in range(points)) / points


def ar_step(model: ModelConfig, visible: float, new: float, denoiser_calls: int) -> float:
    """One autoregressive step of one image: encoder on `visible` tokens, the rest for `new` ones.

    Once per sample; each guidance adds as much. Time embeddings, which the batch shares, are left
    out.
    """
    return networks(model, visible, new) + drawing(model, new, denoiser_calls)


def drawing(model: ModelConfig, new: float, denoiser_calls: int) -> float:
    """The denoiser's part of an autoregressive step."""
    row = denoiser_row(model)
    return new * (denoiser_calls * row["rest"] + row["condition"])


def sample_image(model: ModelConfig, num_ar_steps: int, denoiser_calls: int, guided: bool) -> float:
    """One sampled image with exact shapes."""
    total, visible = 0.0, 0
    for new in reveal_counts(model.num_tokens, num_ar_steps):
        total += ar_step(model, visible, new, denoiser_calls)
        visible += new
    return total * (2 if guided else 1)


def padded_sample_image(model: ModelConfig, segments) -> float:
    """One sampled image with the padded shapes of `segments` (`segments.plan_segments`)."""
    total = 0.0
    for s in segments:
        steps, paired = s.stop - s.start, len(s.paired)
        total += s.halves * paired * networks(model, s.visible, s.ahead)
        total += (steps - paired) * networks(model, s.visible, s.new)
        total += s.halves * steps * drawing(model, s.new, s.denoiser_calls)
        spared = (s.halves - 1) * s.unguided_calls * denoiser_row(model)["rest"]
        total -= steps * s.new * spared
    return total


def count_products(jaxpr: core.Jaxpr) -> float:
    """Matrix products of a traced program over all devices; scans count as often as they run.

    Of the branches of a choice the dearest counts.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
        inner = [count_products(sub) for sub in core.jaxprs_in_params(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner)
        else:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += times * sum(inner)
    return total
