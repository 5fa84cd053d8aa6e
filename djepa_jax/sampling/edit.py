"""Editing: tokens that stay are given to the sampler, and the others are drawn anew.

1. The mask says which places of a picture, clip or sound are to be made anew; tokens that show any
   of them are hidden, but for a share (`keep`) that stays, drawn at random.
2. The sampler begins with the tokens that are not hidden (`core.sampler.Known`).
3. Places outside the mask are put back as they were, to the bit.

Shape letters: n examples, T frames of clips, S samples of sounds, H, W, C as usual, N tokens.
"""

from collections.abc import Callable

import numpy as np

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.config.experiment import Experiment
from djepa_jax.config.places import EditError, places_shape
from djepa_jax.core.modalities.base import MADE
from djepa_jax.core.modalities.programs import tokenized
from djepa_jax.core.sampler import Known
from djepa_jax.sampling.generator import Generator


def named(modality, examples: np.ndarray) -> dict[str, np.ndarray]:
    """Examples `[n, ...]` as exported arrays are called; of pairs both."""
    if hasattr(modality, "named"):
        return modality.named(examples)
    return {MADE[examples.ndim - 1]: examples}


def hidden_tokens(modality, mask: np.ndarray, keep: float, seed: int) -> np.ndarray:
    """Which tokens `[n, N]` are drawn anew, given places `[n, ...]`: of each row the same number.

    Which of them stay depends on the seed and the number of the row alone.

    Raises:
        EditError: `keep` is no share, or the rows hide different numbers of tokens.
    """
    if not 0 <= keep <= 1:
        raise EditError(f"keep is {keep}; it must be a share from 0 to 1.")
    hidden = modality.tokens_at(mask)  # [n, N]
    for index, row in enumerate(hidden):
        places = np.flatnonzero(row)
        stay = np.random.default_rng((seed, index)).permutation(places)
        row[stay[: round(keep * len(places))]] = False
    counts = hidden.sum(axis=1)
    if len(set(counts.tolist())) > 1:
        raise EditError(
            f"the masks hide from {counts.min()} to {counts.max()} tokens; edit pictures whose "
            "masks hide different numbers one after the other."
        )
    return hidden


def edit(
    experiment: Experiment,
    make_generator: Callable[[Known], Generator],
    params,
    examples: np.ndarray,
    mask: np.ndarray,
    conditions,
    seed: int,
    keep: float = 0.0,
    autoencoder: Autoencoder | None = None,
) -> np.ndarray:
    """Examples with the places of a mask made anew; each depends on (seed, i) alone.

    Args:
        experiment: the model's configuration.
        make_generator: of tokens that are given.
        params: the model's parameters, on the mesh.
        examples: uint8 `[n, H, W, C]` or `[n, T, H, W, C]`, int16 `[n, S]`, or bytes of pairs.
        mask: bool, `[H, W]`, `[T, H, W]`, `[S]`, `[2]` or `[n, ...]`, True where anew.
        conditions: raw, one for each example.
        seed: of everything random.
        keep: share of the hidden tokens that stays.
        autoencoder: for models of latents.

    Returns:
        of the shape and type of `examples`, and equal to them outside the mask.
    """
    modality = experiment.modality
    mask = np.broadcast_to(np.asarray(mask, bool), (len(examples), *places_shape(experiment)))
    hidden = hidden_tokens(modality, mask, keep, seed)
    if not hidden[0].any():
        return examples.copy()
    inputs = examples if autoencoder is None else autoencoder.encode(examples)[:, 0]
    tokens = np.asarray(tokenized(modality, inputs))  # [n, N, C]
    generator = make_generator(Known(tokens, ~hidden))
    arrays = generator.images(params, conditions, seed)
    return modality.put_back(examples, arrays, mask)
