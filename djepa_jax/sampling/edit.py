"""Editing: tokens that stay are given to the sampler, and the others are drawn anew.

1. The mask says which places of a picture, clip or sound are to be made anew; tokens that show any
   of them are hidden, but for a share (`keep`) that stays, drawn at random.
2. The sampler begins with the tokens that are not hidden (`core.sampler.Known`).
3. Places outside the mask are put back as they were, to the bit.

Shape letters: n examples, T frames of clips, S samples of sounds, H, W, C as usual, N tokens.
"""

from collections.abc import Callable

import jax
import numpy as np

from djepa_jax.checkpoints.autoencoder import Autoencoder
from djepa_jax.config.experiment import Experiment
from djepa_jax.core.sampler import Known
from djepa_jax.runtime.errors import UserError
from djepa_jax.sampling.generator import Generator

WORDS = "left, right, top, bottom, centre, all, random:SHARE"
NAMES = {2: "sound", 4: "images", 5: "clips"}  # of examples by their axes
FRAME_WORDS = "after:K, between, frames:A-B"
PART_WORDS = "first, second, all, random:SHARE"
SOUND_WORDS = "left, right, centre, middle:SHARE, seconds:A-B, all, random:SHARE"


class EditError(UserError, ValueError):
    """A picture or a mask that cannot be edited."""


def box_of(modality) -> int:
    """Frames of a clip that a token holds; 0 for pictures."""
    return getattr(modality, "patch_frames", 0)


def given_shape(experiment: Experiment) -> tuple[int, ...]:
    """Of an example that is edited; of models of latents it is the picture's."""
    modality = experiment.modality
    return experiment.picture_shape if modality.needs_decoder else modality.example_shape


def places_shape(experiment: Experiment) -> tuple[int, ...]:
    """Of a mask: `(H, W)`, `(T, H, W)`, `(S,)`, or `(2,)` of pairs."""
    shape = given_shape(experiment)
    return getattr(experiment.modality, "places_shape", shape[:-1] or shape)


def named(modality, examples: np.ndarray) -> dict[str, np.ndarray]:
    """Examples `[n, ...]` as exported arrays are called; of pairs both."""
    if hasattr(modality, "named"):
        return modality.named(examples)
    return {NAMES[examples.ndim]: examples}


def check_editable(experiment: Experiment) -> None:
    """Raise EditError for a modality that does not tell which tokens show a place."""
    modality = experiment.modality
    if not hasattr(modality, "tokens_at"):
        raise EditError(
            f'config.data.modality is "{experiment.data.modality}", which cannot be edited; '
            "pictures, clips, sounds and pairs of them can."
        )


def mask_of(
    word: str, shape: tuple[int, ...], box: int = 0, rate: int = 0
) -> tuple[np.ndarray, float]:
    """Places of a `shape` to be made anew (True), and the share of their tokens that stays.

    Args:
        word: left, right, top, bottom, centre (halves, and the middle quarter of the area), all, or
            random:SHARE, which makes that share of all tokens anew; of clips also after:K (frames
            from K on), between (all but the first and the last box), or frames:A-B (A to B),
            counted from 0. Of sounds left, right and centre are halves along time; there are also
            middle:SHARE and seconds:A-B. Of pairs first, second and all.
        shape: of a picture `(H, W)`, a clip `(T, H, W)`, a sound `(S,)`, or of pairs `(2,)`.
        box: frames of a clip that a token holds (`box_of`).
        rate: samples a second of a sound.

    Raises:
        EditError: another word.
    """
    name, _, number = word.partition(":")
    if name == "random" and number:
        try:
            share = float(number)
        except ValueError:
            share = np.nan
        if not 0 <= share <= 1:
            raise EditError(f'--mask "{word}": the share must be a number from 0 to 1.')
        return np.ones(shape, bool), 1 - share
    if rate:
        return _samples(word, shape[0], rate), 0.0
    if len(shape) == 1:
        parts = {"first": [True, False], "second": [False, True], "all": [True, True]}
        if word not in parts:
            raise EditError(f'--mask "{word}" is not one of {PART_WORDS}.')
        return np.array(parts[word]), 0.0
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
    if box and name in ("after", "between", "frames"):
        frames = np.arange(shape[0])
        first, last = _frames(word, shape[0], box)
        anew = (frames >= first) & (frames <= last)
        return np.broadcast_to(anew[:, None, None], shape), 0.0
    if word not in words:
        known = f"{WORDS}, {FRAME_WORDS}" if box else WORDS
        raise EditError(f'--mask "{word}" is neither a picture that is there nor one of {known}.')
    return np.broadcast_to(words[word], shape), 0.0


def _samples(word: str, count: int, rate: int) -> np.ndarray:
    """Which of the samples of a sound a word means: bool `[S]`."""
    name, _, numbers = word.partition(":")
    spans = {"left": (0, 1), "right": (1, 2), "centre": (0.5, 1.5), "all": (0, 2)}
    try:
        if name == "seconds":
            first, last = (float(number) * rate for number in numbers.split("-"))
        elif name == "middle":
            first, last = ((1 + side * float(numbers)) * count / 2 for side in (-1, 1))
        else:
            first, last = (end * count / 2 for end in spans[word])
    except (ValueError, KeyError):
        first = last = np.nan
    if not 0 <= first <= last <= count:
        raise EditError(
            f'--mask "{word}" is not one of {SOUND_WORDS}, with seconds from 0 to {count / rate:g} '
            "and shares from 0 to 1."
        )
    samples = np.arange(count)
    return (samples >= round(first)) & (samples < round(last))


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
    tokens = np.asarray(jax.jit(modality.tokenize)(inputs))  # [n, N, C]
    generator = make_generator(Known(tokens, ~hidden))
    arrays = generator.images(params, conditions, seed)
    return modality.put_back(examples, arrays, mask)
