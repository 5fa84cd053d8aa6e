"""Words that name places of an example: left, centre, after:4, seconds:0.2-0.5, first...

Shape letters: T frames of clips, S samples of sounds, H, W, as usual, N tokens.
"""

import numpy as np

from djepa_jax.config.class_names import split_regions
from djepa_jax.config.convert import ConfigError
from djepa_jax.core.schedules import num_places
from djepa_jax.runtime.errors import UserError

WORDS = "left, right, top, bottom, centre, all, random:SHARE"
FRAME_WORDS = "after:K, between, frames:A-B"
PART_WORDS = "first, second, all, random:SHARE"
SOUND_WORDS = "left, right, centre, middle:SHARE, seconds:A-B, all, random:SHARE"


class EditError(UserError, ValueError):
    """An example, or places of it, that cannot be edited."""


def box_of(modality) -> int:
    """Frames of a clip that a token holds; 0 for pictures."""
    return getattr(modality, "patch_frames", 0)


def given_shape(experiment) -> tuple[int, ...]:
    """Of an example that is edited; of models of latents it is the picture's."""
    modality = experiment.modality
    return experiment.picture_shape if modality.needs_decoder else modality.example_shape


def places_shape(experiment) -> tuple[int, ...]:
    """Of a mask: `(H, W)`, `(T, H, W)`, `(S,)`, or `(2,)` of pairs."""
    shape = given_shape(experiment)
    return getattr(experiment.modality, "places_shape", shape[:-1] or shape)


def check_editable(experiment) -> None:
    """Raise EditError for a modality that does not tell which tokens show a place, or cannot put
    back what stays.
    """
    modality = experiment.modality
    if not (hasattr(modality, "tokens_at") and hasattr(modality, "put_back")):
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


def places_of(experiment, word: str, keep: float = 0.0) -> tuple[np.ndarray, float]:
    """`mask_of` for the examples of an experiment; the share that stays besides is `keep`."""
    modality = experiment.modality
    how = places_shape(experiment), box_of(modality), getattr(modality, "rate", 0)
    places, stays = mask_of(word, *how)
    return places, 1 - (1 - stays) * (1 - keep)


def regions_of(experiment) -> tuple[int, ...]:
    """Which part of a `sample.mix` such as "cat@left,dog@right" holds for each token `[N]`.

    Where places overlap it is the last, where there are none the first.

    Raises:
        ConfigError: places that are not known, or a modality whose tokens have none.
    """
    mix, modality = experiment.sample.mix, experiment.modality
    regions = np.zeros(num_places(modality.grid), int)
    try:
        check_editable(experiment)
        for number, (_, word) in enumerate(split_regions(mix)):
            if word.startswith("random"):
                raise EditError(f'"{word}" names no place.')
            places, _ = places_of(experiment, word)
            regions[modality.tokens_at(places[None])[0]] = number
    except ValueError as error:
        text = str(error).replace("--mask ", "")
        raise ConfigError(f'config.sample.mix is "{mix}": {text}') from error
    return tuple(regions.tolist())
