"""Encoded images of any kind -> upright RGB, and the centre crop that ImageNet results are measured
with.
"""

import io

import numpy as np
from PIL import Image

from djepa_jax.runtime.errors import UserError

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "PPM",
    "TIFF",
)  # no others: Pillow can be made to run programs for some
MAX_ASPECT = 64  # of the sides of an image; more is cut from the ends before anything is enlarged
BITS_PER_SAMPLE = 258  # TIFF tag
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.init()  # fills Image.OPEN, the table of formats


class BrokenImage(UserError, ValueError):
    """Bytes that are not a whole image; the message says why."""


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file into RGB, turned upright as its EXIF data says.

    Transparent parts show white, 16-bit gray is scaled to 8 bits, an animation gives its first
    frame.

    Raises:
        BrokenImage: not an image, cut off, of values with an unknown range, or of more than
            `max_pixels` pixels; the last is found before anything is decoded.
    """
    try:
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise BrokenImage(
                f"it has {image.width} x {image.height} pixels, the limit is {max_pixels} in all"
            )
        image.load()
        return _turn_upright(_to_rgb(image), image)
    except BrokenImage:
        raise
    except (
        Exception
    ) as error:  # damaged files make Pillow's readers fail in ways that nobody has listed
        raise BrokenImage(f"it cannot be decoded ({type(error).__name__}: {error})") from error


def _open(data: bytes) -> Image.Image:
    """Read the header.

    Not `Image.open`, which judges the size by a limit of its own, with a warning that cannot be
    caught in threads.
    """
    for name in FORMATS:
        factory, accepts = Image.OPEN[name]
        if accepts(data[:16]) is True:
            return factory(io.BytesIO(data), "")
    raise BrokenImage(
        f"it is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file" if data else "it is empty"
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImage("it holds floating-point values, whose range is not known")
    if image.mode.startswith("I"):
        return _wide_gray_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _wide_gray_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int32)  # [H, W]
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
    top = 2**bits - 1
    if bits > 16 or values.min() < 0 or values.max() > top:
        raise BrokenImage(
            "it holds whole numbers of more than 16 bits or with a sign, whose range is not known"
        )
    gray = ((values * 255 + top // 2) // top).astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray).convert("RGB")


def _turn_upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    try:
        orientation = original.getexif().get(
            ORIENTATION
        )  # after loading, when TIFF files have been turned already
    except Exception:  # the pixels are whole, whatever is wrong with the note on them
        return rgb
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The middle square of an RGB image, as ADM and its successors cut it: uint8 `[size, size, 3]`.

    Halved with a box filter while the short side is at least twice `size`, then resized to it with
    a bicubic filter. Small images are enlarged.
    """
    image = _shorten(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image)[top : top + size, left : left + size]


def _shorten(image: Image.Image) -> Image.Image:
    """Cut the ends off a strip: a line of pixels would be enlarged to more than the memory
    holds.
    """
    longest = MAX_ASPECT * min(image.size)
    left, top = max(0, image.width - longest) // 2, max(0, image.height - longest) // 2
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 RGB `[H, W, 3]` as it is, or its luminance `[H, W, 1]`.

    Raises:
        ValueError: another number of channels than 1 or 3.
    """
    if channels == 3:
        return pixels
    if channels != 1:
        raise ValueError(f"images have 3 channels, or 1 as luminance, not {channels}.")
    return np.array(Image.fromarray(pixels).convert("L"))[..., None]
