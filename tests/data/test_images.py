"""Decoding images of every kind, and the centre crop."""

import pathlib
import struct
import warnings
import zlib

import numpy as np
import PIL
import pytest
from photos import crop, encode, same
from PIL import Image

from djepa_jax.data.images import BrokenImage, center_crop, decode_image, to_channels

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "crop" / "adm_center_crop.npz"
MAX_PIXELS = 2**26
RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)  # 16-bit gray values


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_with_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + check
        + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    )


# centre crop


def fixture_cases():
    with np.load(FIXTURE) as file:
        return [
            (file[f"image_{i}"], int(file[f"size_{i}"]), file[f"crop_{i}"])
            for i in range(len(file.files) // 3)
        ]


@pytest.mark.parametrize(
    ("image", "size", "expected"), fixture_cases(), ids=lambda v: str(getattr(v, "shape", v))
)
def test_center_crop_is_that_of_adm_to_the_last_bit(image, size, expected):
    pixels = center_crop(Image.fromarray(image), size)
    allowed = (
        0 if int(PIL.__version__.split(".")[0]) >= 13 else 1
    )  # older ones round otherwise where sides are odd
    assert pixels.dtype == np.uint8 and np.abs(pixels.astype(int) - expected).max() <= allowed


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 7), (3, 2), (63, 64), (64, 63), (65, 64), (127, 128), (128, 1000), (1000, 129)],
)
def test_center_crop_has_the_size_asked_for(shape):
    pixels = center_crop(Image.fromarray(np.full((*shape, 3), 77, np.uint8)), 64)
    assert same(pixels, np.full((64, 64, 3), 77, np.uint8))


def test_strip_of_pixels_is_not_enlarged_beyond_memory():
    strip = np.zeros((1, 200_001, 3), np.uint8)
    strip[0, 100_000] = 255  # the middle one
    pixels = center_crop(Image.fromarray(strip), 256)
    assert pixels.shape == (256, 256, 3) and pixels[:, 100:156].min() > 100 and pixels.max() == 255


def test_channels():
    pixels = np.asarray(crop("flower"))
    assert same(to_channels(pixels, 3), pixels)
    luminance = to_channels(pixels, 1)
    assert (
        luminance.shape == (75, 100, 1)
        and np.abs(luminance[..., 0] - pixels @ [0.299, 0.587, 0.114]).max() < 1
    )
    gray = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    assert same(to_channels(gray, 1)[..., 0], gray[..., 0])
    with pytest.raises(ValueError, match="not 4"):
        to_channels(pixels, 4)


# kinds of images


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}),
    ],
)
def test_formats(kind, options):
    pixels = decode(encode(crop("temple"), kind, **options)).astype(int)
    assert np.abs(pixels - np.asarray(crop("temple"))).max() <= (4 if kind == "JPEG" else 0)


def test_gray_and_palette_and_bilevel():
    gray = crop("flower").convert("L")
    assert same(decode(encode(gray, "PNG")), np.repeat(np.asarray(gray)[..., None], 3, -1))
    palette = crop("flower").quantize(64)
    assert same(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert same(decode(encode(palette, "GIF")), np.asarray(palette.convert("RGB")))
    bilevel = gray.convert("1")
    assert same(decode(encode(bilevel, "PNG"))[..., 0], np.asarray(bilevel).astype(np.uint8) * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_and_not_clipped(kind):
    pixels = decode(encode(Image.fromarray(RAMP), kind))
    assert (
        same(pixels[..., 0], np.round(RAMP / 257).astype(np.uint8))
        and pixels[..., 1:].std(-1).max() == 0
    )


def test_gray_of_unknown_range_is_refused():
    for values in (
        RAMP.astype(np.float32),
        RAMP.astype(np.int32) * 100_000,
        -RAMP.astype(np.int32),
    ):
        with pytest.raises(BrokenImage, match="range is not known"):
            decode(encode(Image.fromarray(values), "TIFF"))


def test_cmyk_and_inverted_cmyk():
    colour = (
        crop("flower", width=64, height=64)
        .resize((8, 8))
        .resize((64, 64), Image.Resampling.NEAREST)
    )
    cmyk = colour.convert("CMYK")
    plain = decode(encode(cmyk, "TIFF"))
    assert np.abs(plain.astype(int) - np.asarray(colour)).max() <= 1
    # Pillow writes JPEG files as Adobe programs do, with inverted values and their marker
    data = encode(cmyk, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data and np.abs(decode(data).astype(int) - plain).mean() < 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_parts_show_white(mode):
    image = crop("temple").convert("L" if mode in ("LA", "L") else "RGB")
    options, left = {}, np.zeros((75, 100), np.uint8)
    left[:, 50:] = 255
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(left))
    else:  # one transparent colour, or one entry of the palette
        colour = (1, 2, 3) if mode in ("RGB", "P") else 2
        image.paste(colour, (0, 0, 50, 75))
        image = image.quantize(32) if mode == "P" else image
        options["transparency"] = image.getpixel((0, 0))
    pixels = decode(encode(image, "PNG", **options))
    assert (pixels[:, :50] == 255).all() and 30 < pixels[:, 50:].mean() < 225


def test_half_transparent_is_mixed_with_white():
    image = Image.new("RGBA", (3, 3), (100, 0, 200, 51))
    assert (np.abs(decode(encode(image, "PNG")).astype(int) - (224, 204, 244)) <= 1).all()


def test_16_bit_gray_with_a_transparent_value():
    pixels = decode(encode(Image.fromarray(RAMP), "PNG", transparency=160))
    assert pixels[0, 10, 0] == 255 and pixels[0, 11, 0] == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("red", (0, 0, 16, 8))  # a mark in the upper left corner of what the camera stored
    stored = {
        1: image,
        2: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: image.transpose(Image.Transpose.ROTATE_180),
        4: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: image.transpose(Image.Transpose.TRANSPOSE),
        6: image.transpose(Image.Transpose.ROTATE_90),
        7: image.transpose(Image.Transpose.TRANSVERSE),
        8: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encode(stored, kind, exif=exif)).astype(int)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels - np.asarray(image)).mean() < 12 and pixels[:7, :15, 0].min() > 180


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter():
    data = encode(crop("flower"), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    assert same(decode(data), decode(encode(crop("flower"))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_image_of_one_pixel(kind):
    pixels = center_crop(
        decode_image(encode(Image.new("RGB", (1, 1), (200, 200, 200)), kind), MAX_PIXELS), 32
    )
    assert pixels.shape == (32, 32, 3) and np.abs(pixels.astype(int) - 200).max() <= 2


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        pixels = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3


# broken ones


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
def test_truncated_file_is_broken_or_lacks_nothing(kind, options):
    data = encode(crop("temple"), kind, **options)
    whole, broken = decode(data), 0
    cuts = sorted({*range(0, len(data), len(data) // 80 + 1), *range(len(data) - 40, len(data))})
    for cut in cuts:
        try:
            assert same(decode(data[:cut]), whole)  # only what follows the pixels was cut off
        except BrokenImage:
            broken += 1
    assert broken == len(cuts) if kind == "JPEG" else broken > 0.6 * len(cuts)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"just some text\n" * 100, "not a JPEG"),
        (b"\xff\xd8\xff" + bytes(500), "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
        (b"GIF89a", "cannot be decoded"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not a JPEG",
        ),  # Pillow would start Ghostscript
        (b"RIFF\0\0\0\0WEBPVP8 ", "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_broken(data, words):
    with pytest.raises(BrokenImage, match=words):
        decode(data)


def test_damaged_png_is_broken():
    data = bytearray(encode(crop("temple"), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BrokenImage):
        decode(bytes(data))


@pytest.mark.parametrize(
    "size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (10_000, 10_000), (2**26 + 1, 1)]
)
def test_decompression_bomb_is_found_in_the_header(size):
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # Pillow's own limit warns at 10,000 x 10,000 and raises beyond
        with pytest.raises(BrokenImage, match=f"{size[0]} x {size[1]} pixels"):
            decode_image(png_with_size(*size), MAX_PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "WEBP", "TIFF"])
def test_limit_on_pixels_holds_for_every_format(kind):
    data = encode(crop("temple", width=100, height=75), kind)
    assert decode_image(data, 7500).size == (100, 75)
    with pytest.raises(BrokenImage, match="100 x 75 pixels, the limit is 7499"):
        decode_image(data, 7499)
