"""Metrics by name, as `config.evaluation.kind` gives it."""

from djepa_jax.evaluation.metrics.base import Metric
from djepa_jax.evaluation.metrics.captions import Captions
from djepa_jax.evaluation.metrics.moving_digits import MovingDigits
from djepa_jax.evaluation.metrics.say_and_draw import SayAndDraw
from djepa_jax.evaluation.metrics.small_images import SmallImages
from djepa_jax.evaluation.metrics.speech import Speech
from djepa_jax.evaluation.metrics.spoken_digits import SpokenDigits

METRICS: dict[str, type[Metric]] = {
    "small_images": SmallImages,
    "spoken_digits": SpokenDigits,
    "moving_digits": MovingDigits,
    "captions": Captions,
    "speech": Speech,
    "say_and_draw": SayAndDraw,
}

__all__ = ["METRICS", "Metric"]
