"""Token losses by name, and the JEPA loss."""

from djepa_jax.core.losses.base import TokenLoss
from djepa_jax.core.losses.diffusion import Diffusion
from djepa_jax.core.losses.flow_matching import FlowMatching
from djepa_jax.core.losses.jepa import feature_statistics, jepa_loss
from djepa_jax.core.losses.shortcut import Shortcut
from djepa_jax.core.losses.x_prediction import XPrediction

TOKEN_LOSSES: dict[str, type[TokenLoss]] = {
    "diffusion": Diffusion,
    "flow_matching": FlowMatching,
    "shortcut": Shortcut,
    "x_prediction": XPrediction,
}

__all__ = ["TOKEN_LOSSES", "TokenLoss", "feature_statistics", "jepa_loss"]
