"""Image files -> upright RGB, and the centre crop that ImageNet results are measured with."""

import contextlib
import io
import itertools
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, ImageSequence
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

from djepa_jax.runtime.errors import UserError

# No others: Pillow can be made to run programs for some.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
MAX_ASPECT = 64  # of the sides of an image; more is cut from the ends before anything is enlarged
SIGNED = 2  # TIFF: what SAMPLEFORMAT may say
CLIPS, MP4 = ("GIF", "WEBP", "PNG", "MP4"), ".mp4"  # what may hold clips
NO_MP4 = 'mp4 needs the package av: pip install "djepa_jax[video]", or make it GIF or WebP'

Image.init()  # fills Image.OPEN, the table of formats
KINDS = Image.registered_extensions().items()
ENDINGS = tuple(ending for ending, name in KINDS if name in FORMATS)
CLIP_ENDINGS = (*(ending for ending, name in KINDS if name in CLIPS), MP4)


class BrokenImage(UserError, ValueError):
    """Bytes that are not a whole image; the message says why."""


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """An image file as RGB, turned upright as its EXIF data says.

    Transparent parts show white, 16-bit gray is scaled to 8 bits, an animation gives its first
    frame. More than `max_pixels` pixels are found before anything is decoded.
    """
    try:
        image = open_image(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            size = f"{image.width} x {image.height} pixels"
            raise BrokenImage(f"it has {size}, the limit is {max_pixels} in all")
        tags = getattr(image, "tag_v2", {})  # of TIFF files; turning them loses these
        if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
            depth = data[24]  # of the file; Pillow scales the gray values, and not this one
            image.info["transparency"] *= 255 // (2**depth - 1)
        image.load()  # which turns TIFF files upright
        with contextlib.suppress(Exception):  # damaged EXIF data; the pixels are whole
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image, tags)
    except BrokenImage:
        raise
    except Exception as error:  # damaged files make Pillow fail in ways that nobody has listed
        raise BrokenImage(f"it cannot be decoded ({type(error).__name__}: {error})") from error


def decode_frames(data: bytes, max_pixels: int, count: int) -> Iterator[Image.Image]:
    """The first `count` frames of an animation (GIF, WebP, PNG, or mp4 where `av` is) as RGB.

    Transparent parts show white. One frame is in memory at a time.
    """
    found = 0
    try:
        is_mp4 = data[4:8] == b"ftyp"
        (width, height), frames = _open_mp4(data) if is_mp4 else _open_animation(data)
        if width * height > max_pixels:
            size = f"frames of {width} x {height} pixels"
            raise BrokenImage(f"it has {size}, the limit is {max_pixels}")
        for frame in itertools.islice(frames, count):
            found += 1
            yield frame
    except BrokenImage:
        raise
    except Exception as error:  # as above
        raise BrokenImage(f"it cannot be decoded ({type(error).__name__}: {error})") from error
    if found < count:
        raise BrokenImage(f"it has {found} frames, and clips have {count}")


def _open_animation(data: bytes) -> tuple[tuple[int, int], Iterator[Image.Image]]:
    image = open_image(io.BytesIO(data))
    return image.size, (_to_rgb(frame, {}) for frame in ImageSequence.Iterator(image))


def _open_mp4(data: bytes) -> tuple[tuple[int, int], Iterator[Image.Image]]:
    try:
        import av
    except ImportError as error:
        raise BrokenImage(NO_MP4) from error
    video = av.open(io.BytesIO(data)).streams.video[0]
    frames = video.container.decode(video)
    # What telephones film is turned by a note in the file.
    upright = (frame.to_image().rotate(frame.rotation, expand=True) for frame in frames)
    return (video.width, video.height), upright


def open_image(file: BinaryIO) -> Image.Image:
    """Read the header. `Image.open` would judge the size by a limit of its own."""
    head = file.read(16)
    file.seek(0)
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts(head) is True:
            return factory(file, "")
    raise BrokenImage(f"it is not a file of {', '.join(FORMATS)}" if head else "it is empty")


def is_image(file: BinaryIO, ending: str) -> bool:
    """Whether the content of a file, whose name has some `ending`, says that it is an image."""
    try:
        image = open_image(file)
    except Exception:  # as above
        return False
    # What cameras write besides (.nef, .dng) opens as TIFF too, and shows a thumbnail.
    return image.format != "TIFF" or not ending


def _to_rgb(image: Image.Image, tags: dict) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("it holds floating-point values, whose range is not known")
    if SIGNED in tags.get(SAMPLEFORMAT, ()):
        raise BrokenImage("it holds signed values, whose range is not known")
    if image.mode.startswith("I"):
        return _wide_gray_to_rgb(image, tags)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _wide_gray_to_rgb(image: Image.Image, tags: dict) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # [H, W]
    bits = tags.get(BITSPERSAMPLE, (16,))[0]
    top = 2**bits - 1
    if bits > 16:
        raise BrokenImage("it holds more than 16 bits, whose range is not known")
    if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero; Pillow turns 8 bits and fewer
        values = top - values
    gray = ((values * 255 + top // 2) // top).astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray).convert("RGB")


def center_crop(image: Image.Image, size: int, channels: int = 3) -> np.ndarray:
    """The middle square of an RGB image, as ADM cuts it: uint8 `[size, size, 3]`, or its luminance.

    Halved with a box filter while the short side is at least twice `size`, then resized to it with
    a bicubic filter. Small images are enlarged.
    """
    # A line of pixels would be enlarged to more than the memory holds: its ends are cut off.
    longest = MAX_ASPECT * min(image.size)
    left, top = max(0, image.width - longest) // 2, max(0, image.height - longest) // 2
    image = image.crop((left, top, image.width - left, image.height - top))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    if channels == 1:
        return np.array(image.convert("L"))[..., None]
    return np.array(image)
