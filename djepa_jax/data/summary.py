"""What a data set holds and what is done to it, in a few lines for people."""

import io

import numpy as np

from djepa_jax.config.class_names import called_by_numbers, listed
from djepa_jax.config.experiment import Experiment
from djepa_jax.data.captions import captioned
from djepa_jax.data.images import CLIPS, FORMATS, BrokenImage, open_image
from djepa_jax.data.records import ImageSource, Source, counted, unwrapped

LOOKED_AT = 200  # images whose headers are read, spread over the data
MAX_BYTES = 2**26  # of these images; large ones are fewer
GRAY = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
MANY_TIMES = 8  # smaller, where detail is lost that somebody may have wanted


def describe_data(experiment: Experiment, source: Source) -> list[str]:
    """What is trained on, what becomes of images or clips, and the classes by index and name."""
    captions, source = captioned(source), unwrapped(source)
    lines = list(getattr(source, "notes", []))  # of sounds
    if isinstance(source, ImageSource):
        clips, left_out = len(source.shape) == 4, source.records.left_out
        lines = describe_clips(source) if clips else describe_images(source)
        if left_out:
            read = ", ".join(CLIPS if clips else FORMATS)
            lines.append(f"left out: {counted(left_out)} (read are {read})")
    if captions:
        lines.append(captions.note)
    names = experiment.class_names
    if experiment.data.class_names:
        hint = "; a number in sample.labels means such a name" if called_by_numbers(names) else ""
        lines.append(f"classes: {listed(range(len(names)), names)}{hint}")
    return lines


def describe_images(source: ImageSource) -> list[str]:
    """The images of a source, from a look at some, and what their crop makes of them."""
    records, (_, size, channels) = source.records, source.shape
    found, seen = look_at(records)
    classes = f" of {len(records.class_names)} classes" if records.class_names else ""
    line = f"{source.where}: {len(source):,} images{classes}; of {seen} looked at, "
    if not found:
        return [f"{line}none can be read"]
    shapes, sides = [shape for shape, _ in found], np.array([min(shape) for shape, _ in found])
    ends = dict.fromkeys((min(shapes, key=min), max(shapes, key=min)))
    colour = sum(mode not in GRAY for _, mode in found)
    smaller, larger = int((sides < size).sum()), int((sides > size).sum())
    lines = [
        f"{line}{' to '.join(f'{width} x {height}' for width, height in ends)} pixels, {colour} in "
        f"colour, {len(found) - colour} gray, {seen - len(found)} cannot be read",
        f"the middle square of each becomes {size} x {size} in "
        f"{'gray' if channels == 1 else 'colour'}: {larger} reduced, {smaller} enlarged",
    ]
    warnings = {
        f"{colour} are in colour and made gray; --config.data.channels=3 keeps colour": (
            channels == 1 and colour
        ),
        f"{smaller} are enlarged, and blurred by that": smaller,
        f"most are {MANY_TIMES} times larger than {size} x {size} or more; fine detail is lost": (
            np.median(sides) >= MANY_TIMES * size
        ),
    }
    return lines + [f"WARNING: {text}" for text, applies in warnings.items() if applies]


def describe_clips(source: ImageSource) -> list[str]:
    """The clips of a source, and how many of some cannot be used."""
    frames, size, _, channels = source.shape
    spread = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT // frames + 1).astype(int))
    broken = 0
    for index in spread:
        try:
            source[int(index)]
        except BrokenImage:
            broken += 1
    colour = "gray" if channels == 1 else "colour"
    return [
        f"{source.where}: {len(source):,} clips, of which the first {frames} frames are taken; of "
        f"{len(spread)} looked at, {broken} cannot be read or have too few",
        f"the middle square of each becomes {size} x {size} in {colour}",
    ]


def look_at(records) -> tuple[list[tuple[tuple[int, int], str]], int]:
    """Size and mode of some images, as their headers say, and how many were looked at."""
    spread = np.unique(np.linspace(0, len(records) - 1, LOOKED_AT).astype(int))
    found, seen, size = [], 0, 0
    for index in np.random.default_rng(0).permutation(spread):
        seen += 1
        try:
            data, _ = records[int(index)]
            size += len(data)
            image = open_image(io.BytesIO(data))
            found.append((image.size, image.mode))
        except Exception:  # as many kinds as there are broken files; training will name it
            continue
        if size > MAX_BYTES:
            break
    return found, seen
