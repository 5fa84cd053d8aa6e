"""Editing: tokens that stay are given to the sampler, and the others are drawn anew.

1. The mask says which places of a picture or clip are to be made anew; tokens that show any of them
   are hidden, but for a share (`keep`) that stays, drawn at random.
2. The sampler begins with the tokens that are not hidden (`core.sampler.Known`).
3. Places outside the mask are put back as they were, to the bit.

Shape letters: n pictures or clips, T frames of clips, H, W, C as usual, N tokens.
"""

from collections.abc import Callable

import jax
import numpy as np

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.sampler import Known
from djepa_jax.runtime.errors import UserError
from djepa_jax.sampling.generator import Generator, result_of

WORDS = "left, right, top, bottom, centre, all, random:SHARE"
FRAME_WORDS = "after:K, between, frames:A-B"


class EditError(UserError, ValueError):
    """A picture or a mask that cannot be edited."""


def box_of(modality) -> int:
    """Frames of a clip that a token holds; 0 for pictures."""
    return getattr(modality, "patch_frames", 0)


def check_editable(experiment: Experiment) -> None:
    """Raise EditError for a modality that does not tell which tokens show a place."""
    modality = experiment.modality
    if not hasattr(modality, "tokens_at"):
        raise EditError(
            f'config.data.modality is "{experiment.data.modality}", which cannot be edited; '
            "pictures and clips can."
        )


def mask_of(word: str, shape: tuple[int, ...], box: int = 0) -> tuple[np.ndarray, float]:
    """Places `[H, W]` or `[T, H, W]` to be made anew (True), the share of their tokens that stays.

    Args:
        word: left, right, top, bottom, centre (halves, and the middle quarter of the area), all, or
            random:SHARE, which makes that share of all tokens anew; of clips also after:K (frames
            from K on), between (all but the first and the last box), or frames:A-B (A to B),
            counted from 0.
        shape: of a picture `(H, W)`, or of a clip `(T, H, W)`.
        box: frames of a clip that a token holds (`box_of`).

    Raises:
        EditError: another word.
    """
    height, width = shape[-2:]
    rows, columns = np.mgrid[:height, :width]
    words = {
        "left": columns < width / 2,
        "right": columns >= width / 2,
        "top": rows < height / 2,
        "bottom": rows >= height / 2,
        "centre": (abs(2 * rows + 1 - height) < height / 2)
        & (abs(2 * columns + 1 - width) < width / 2),
        "all": np.ones((height, width), bool),
    }
    name, _, number = word.partition(":")
    if box and name in ("after", "between", "frames"):
        frames = np.arange(shape[0])
        first, last = _frames(word, shape[0], box)
        anew = (frames >= first) & (frames <= last)
        return np.broadcast_to(anew[:, None, None], shape), 0.0
    if name == "random" and number:
        try:
            share = float(number)
        except ValueError:
            share = np.nan
        if not 0 <= share <= 1:
            raise EditError(f'--mask "{word}": the share must be a number from 0 to 1.')
        return np.broadcast_to(words["all"], shape), 1 - share
    if word not in words:
        known = f"{WORDS}, {FRAME_WORDS}" if box else WORDS
        raise EditError(f'--mask "{word}" is neither a picture that is there nor one of {known}.')
    return np.broadcast_to(words[word], shape), 0.0


def _frames(word: str, count: int, box: int) -> tuple[int, int]:
    """The first and the last frame that a word means; EditError unless they are of whole boxes."""
    name, _, numbers = word.partition(":")
    try:
        if word == "between":
            first, last = box, count - box - 1
        elif name == "after":
            first, last = int(numbers), count - 1
        else:
            first, last = map(int, numbers.split("-"))
    except ValueError:
        first = last = -1
    if not 0 <= first <= last < count or first % box or (last + 1) % box:
        raise EditError(
            f'--mask "{word}": write {FRAME_WORDS} with frames from 0 to {count - 1}; tokens hold '
            f"{box} frames, so make whole ones anew, such as after:{box} or "
            f"frames:{box}-{2 * box - 1}."
        )
    return first, last


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
    """Pictures or clips with the places of a mask made anew; each depends on (seed, i) alone.

    Args:
        experiment: the model's configuration.
        make_generator: of tokens that are given.
        params: the model's parameters, on the mesh.
        examples: uint8 `[n, H, W, C]` or `[n, T, H, W, C]`.
        mask: bool, `[H, W]`, `[T, H, W]` or `[n, ...]`, True where anew.
        conditions: raw, one for each picture.
        seed: of everything random.
        keep: share of the hidden tokens that stays.
        autoencoder: for models of latents.

    Returns:
        uint8, of the shape of `examples` and equal to them outside the mask.
    """
    modality = experiment.modality
    mask = np.broadcast_to(np.asarray(mask, bool), examples.shape[:-1])
    hidden = hidden_tokens(modality, mask, keep, seed)
    if not hidden[0].any():
        return examples.copy()
    inputs = examples if autoencoder is None else autoencoder.encode(examples)[:, 0]
    tokens = np.asarray(jax.jit(modality.tokenize)(inputs))  # [n, N, C]
    generator = make_generator(Known(tokens, ~hidden))
    drawn = result_of(modality, generator.images(params, conditions, seed))
    return np.where(mask[..., None], drawn, examples)
