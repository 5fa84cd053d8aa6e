"""Token losses by name, and the JEPA loss."""

from djepa_jax.core.losses.diffusion import Diffusion
from djepa_jax.core.losses.flow_matching import FlowMatching
from djepa_jax.core.losses.jepa import feature_statistics, jepa_loss

TOKEN_LOSSES = {"diffusion": Diffusion, "flow_matching": FlowMatching}
SAMPLERS = {"diffusion": ("ddpm", "ddim"), "flow_matching": ("euler", "heun")}

__all__ = ["SAMPLERS", "TOKEN_LOSSES", "feature_statistics", "jepa_loss"]
