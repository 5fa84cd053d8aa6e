"""Decoding images of every kind, and the centre crop."""

import itertools
import pathlib
import struct
import warnings
import zlib

import numpy as np
import PIL
import pytest
from photos import crop, encode, same
from PIL import Image

from djepa_jax.data.images import BrokenImage, center_crop, decode_image

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "crop" / "adm_center_crop.npz"
MAX_PIXELS = 2**26
RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)  # 16-bit gray values


def decode(data: bytes) -> np.ndarray:
    image = decode_image(data, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def png(
    width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 0, depth: int = 8
) -> bytes:
    """A PNG of some chunks, gray and of 8 bits unless told otherwise."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pieces = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [(b"IHDR", header), *chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def packed(levels: np.ndarray, depth: int, order: str) -> list[bytes]:
    """Rows of samples `[H, W, C]` as files hold them, each filled up to whole bytes."""
    if depth in (16, 32):
        return [row.astype(f"{order}u{depth // 8}").tobytes() for row in levels]
    bits = [((row.reshape(-1, 1) >> np.arange(depth)[::-1]) & 1).reshape(-1) for row in levels]
    return [np.packbits(row.astype(np.uint8)).tobytes() for row in bits]


def tiff(levels: np.ndarray, depth: int, photometric: int, order: str = "<", **tags) -> bytes:
    """An uncompressed TIFF of samples `[H, W, C]`; further tags as `T338=[0]`."""
    height, width, channels = levels.shape
    data = b"".join(packed(levels, depth, order))
    values = {256: [width], 257: [height], 258: [depth] * channels, 259: [1], 262: [photometric]}
    values |= {273: [8], 277: [channels], 278: [height], 279: [len(data)]}
    values |= {int(name[1:]): value for name, value in tags.items()}
    long = b"".join(struct.pack(f"{order}{len(v)}H", *v) for v in values.values() if len(v) > 2)
    place, entries = 8 + len(data), b""
    for tag, value in sorted(values.items()):
        found = struct.pack(f"{order}{len(value)}H", *value)
        if len(value) > 2:
            start = long.index(found) + place
            found = struct.pack(f"{order}I", start)
        entries += struct.pack(f"{order}HHI", tag, 3, len(value)) + found.ljust(4, b"\0")
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, place + len(long))
    return start + data + long + struct.pack(f"{order}H", len(values)) + entries + bytes(4)


# centre crop


def test_center_crop_is_that_of_adm_to_the_last_bit():
    # older versions of Pillow round otherwise where sides are odd
    allowed = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 1
    with np.load(FIXTURE) as file:
        for i in range(len(file.files) // 3):
            pixels = center_crop(Image.fromarray(file[f"image_{i}"]), int(file[f"size_{i}"]))
            assert pixels.dtype == np.uint8
            assert np.abs(pixels.astype(int) - file[f"crop_{i}"]).max() <= allowed, i


def test_center_crop_has_the_size_asked_for():
    for shape in [(1, 1), (1, 7), (3, 2), (63, 64), (65, 64), (127, 128), (128, 999), (999, 129)]:
        pixels = center_crop(Image.fromarray(np.full((*shape, 3), 77, np.uint8)), 64)
        assert same(pixels, np.full((64, 64, 3), 77, np.uint8)), shape


def test_strip_of_pixels_is_not_enlarged_beyond_memory():
    strip = np.zeros((1, 200_001, 3), np.uint8)
    strip[0, 100_000] = 255  # the middle one
    pixels = center_crop(Image.fromarray(strip), 256)
    assert pixels.shape == (256, 256, 3) and pixels[:, 100:156].min() > 100 and pixels.max() == 255


def test_one_channel_is_luminance():
    pixels, luminance = center_crop(crop("flower"), 75), center_crop(crop("flower"), 75, channels=1)
    assert luminance.shape == (75, 75, 1)
    assert np.abs(luminance[..., 0] - pixels @ [0.299, 0.587, 0.114]).max() < 1


# kinds of images


def test_formats():
    for kind, options in (
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
        ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}),
    ):
        data = encode(crop("temple"), kind, **options)
        difference = np.abs(decode(data).astype(int) - np.asarray(crop("temple")))
        assert difference.max() <= (4 if kind == "JPEG" else 0), kind
        assert decode_image(data, 7500).size == (100, 75)
        with pytest.raises(BrokenImage, match="100 x 75 pixels, .* 7499"):
            decode_image(data, 7499)


def test_gray_and_palette_and_bilevel():
    gray = crop("flower").convert("L")
    assert same(decode(encode(gray, "PNG")), np.repeat(np.asarray(gray)[..., None], 3, -1))
    palette = crop("flower").quantize(64)
    assert same(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert same(decode(encode(palette, "GIF")), np.asarray(palette.convert("RGB")))
    bilevel = gray.convert("1")
    assert same(decode(encode(bilevel, "PNG"))[..., 0], np.asarray(bilevel).astype(np.uint8) * 255)


def test_16_bit_gray_is_scaled_and_not_clipped():
    for kind in ("PNG", "TIFF", "PPM"):
        pixels = decode(encode(Image.fromarray(RAMP), kind))
        assert same(pixels[..., 0], np.round(RAMP / 257).astype(np.uint8)), kind
        assert pixels.std(-1).max() == 0
    pixels = decode(encode(Image.fromarray(RAMP), "PNG", transparency=160))
    assert pixels[0, 10, 0] == 255 and pixels[0, 11, 0] == 1


def test_gray_of_unknown_range_is_refused():
    for values in (RAMP.astype(np.float32), RAMP.astype(np.int32) * 99_999, -RAMP.astype(np.int32)):
        with pytest.raises(BrokenImage, match="range is not known"):
            decode(encode(Image.fromarray(values), "TIFF"))


GRAY = np.round(np.linspace(0, 255, 16)).astype(int).reshape(2, 8, 1)
COLOURS = np.concatenate([GRAY, 255 - GRAY, GRAY // 2], -1)  # [2, 8, 3]
OPAQUE = np.full_like(GRAY, 255)


def test_every_depth_of_gray_has_its_values_and_no_negative():
    for depth in (1, 2, 4, 8, 12, 16):
        top = 2**depth - 1
        levels = np.round(GRAY / 255 * top).astype(int)
        expected = np.repeat(np.round(levels * 255 / top).astype(np.uint8), 3, -1)
        for order in "<>" if depth != 12 else "<":
            assert same(decode(tiff(levels, depth, 1, order)), expected), (depth, order)
        inverted = tiff(top - levels, depth, 0)  # white is zero
        if depth == 12:  # a kind that Pillow lacks
            with pytest.raises(BrokenImage):
                decode(inverted)
            continue
        assert same(decode(inverted), expected), depth
        rows = b"".join(b"\0" + row for row in packed(levels, depth, ">"))
        pixels = png(8, 2, (b"IDAT", zlib.compress(rows)), depth=depth)
        assert same(decode(pixels), expected), depth
        seen = (b"tRNS", struct.pack(">H", levels[0, 1, 0]))
        pixels = decode(png(8, 2, seen, (b"IDAT", zlib.compress(rows)), depth=depth))
        hidden = levels[..., 0] == levels[0, 1, 0]
        assert (pixels[hidden] == 255).all() and same(pixels[~hidden], expected[~hidden]), depth


def test_every_kind_of_colour_has_its_values():
    palette = np.zeros((3, 256), int)
    palette[:, :16] = COLOURS.reshape(16, 3).T * 257
    numbers = np.arange(16).reshape(2, 8, 1)
    gray = np.repeat(GRAY, 3, -1)
    cmyk = np.concatenate([255 - COLOURS, 0 * GRAY], -1)
    grays = np.concatenate([GRAY, 0 * GRAY + 128, 0 * GRAY + 128], -1)
    alpha = np.concatenate([COLOURS, OPAQUE], -1)
    for order in "<>":
        for kind, data, expected in (
            ("palette", tiff(numbers, 8, 3, order, T320=palette.reshape(-1)), COLOURS),
            ("RGB", tiff(COLOURS, 8, 2, order), COLOURS),
            ("RGB, wide", tiff(COLOURS * 257, 16, 2, order), COLOURS),
            ("RGB and another", tiff(alpha // 2 * 2, 8, 2, order, T338=[0]), COLOURS // 2 * 2),
            ("RGBA", tiff(alpha, 8, 2, order, T338=[2]), COLOURS),
            ("RGBA, wide", tiff(alpha * 257, 16, 2, order, T338=[2]), COLOURS),
            ("CMYK", tiff(cmyk, 8, 5, order), COLOURS),
            ("CMYK, wide", tiff(cmyk * 257, 16, 5, order), COLOURS),
            ("YCbCr", tiff(grays, 8, 6, order, T530=[1, 1]), gray),
            ("LA", tiff(np.concatenate([GRAY, OPAQUE], -1), 8, 1, T338=[2]), gray),
        ):
            assert same(decode(data), expected.astype(np.uint8)), (kind, order)


def test_signed_values_are_refused():
    for depth in (8, 16):
        with pytest.raises(BrokenImage, match="signed"):
            decode(tiff(GRAY // 2, depth, 1, T339=[2]))


def test_cmyk_and_inverted_cmyk():
    small = crop("flower", width=64, height=64).resize((8, 8))
    colour = small.resize((64, 64), Image.Resampling.NEAREST)
    cmyk = colour.convert("CMYK")
    plain = decode(encode(cmyk, "TIFF"))
    assert np.abs(plain.astype(int) - np.asarray(colour)).max() <= 1
    # Pillow writes JPEG files as Adobe programs do, with inverted values and their marker
    data = encode(cmyk, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data and np.abs(decode(data).astype(int) - plain).mean() < 2


def test_transparent_parts_show_white():
    for mode in ("RGBA", "LA", "P", "RGB", "L"):
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
        assert (pixels[:, :50] == 255).all() and 30 < pixels[:, 50:].mean() < 225, mode


def test_half_transparent_is_mixed_with_white():
    image = Image.new("RGBA", (3, 3), (100, 0, 200, 51))
    assert (np.abs(decode(encode(image, "PNG")).astype(int) - (224, 204, 244)) <= 1).all()


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (32, 16), "black")
    image.paste("red", (0, 0, 16, 8))  # a mark in the upper left corner of what the camera stored
    turns = Image.Transpose
    undone = [turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE]
    undone += [turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270]
    cases = itertools.product(("JPEG", "PNG", "WEBP", "TIFF"), enumerate([None, *undone], start=1))
    for kind, (orientation, turn) in cases:
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = image if turn is None else image.transpose(turn)
        pixels = decode(encode(stored, kind, exif=exif)).astype(int)
        assert pixels.shape == (16, 32, 3), (kind, orientation)
        assert np.abs(pixels - np.asarray(image)).mean() < 12 and pixels[:7, :15, 0].min() > 180


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter():
    data = encode(crop("flower"), exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")
    assert same(decode(data), decode(encode(crop("flower"))))


def test_image_of_one_pixel():
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = encode(Image.new("RGB", (1, 1), (200, 200, 200)), kind)
        pixels = center_crop(decode_image(data, MAX_PIXELS), 32)
        assert pixels.shape == (32, 32, 3) and np.abs(pixels.astype(int) - 200).max() <= 2, kind


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP"):
        pixels = decode(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 3, kind


# broken ones


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
def test_truncated_file_is_broken_or_lacks_nothing():
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        data = encode(crop("temple"), kind)
        whole, broken = decode(data), 0
        cuts = sorted(
            {*range(0, len(data), len(data) // 40 + 1), *range(len(data) - 20, len(data))}
        )
        for cut in cuts:
            try:
                assert same(decode(data[:cut]), whole)  # only what follows the pixels was cut off
            except BrokenImage:
                broken += 1
        assert broken == len(cuts) if kind == "JPEG" else broken > 0.6 * len(cuts)


def test_what_is_no_image_is_broken():
    for data, words in (
        (b"", "empty"),
        (b"just some text\n" * 100, "JPEG"),
        (b"\xff\xd8\xff" + bytes(500), "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
        (encode(crop("temple"), "PNG")[:-2000] + bytes(2000), "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "JPEG"),  # would start Ghostscript
    ):
        with pytest.raises(BrokenImage, match=words):
            decode(data)


def test_decompression_bomb_is_found_in_the_header():
    for size in [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (10_000, 10_000), (2**26 + 1, 1)]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow's own limit warns, and raises beyond
            with pytest.raises(BrokenImage, match=f"{size[0]} x {size[1]} pixels"):
                decode_image(png(*size, (b"IDAT", b""), colour=2), MAX_PIXELS)


def test_nothing_in_an_image_is_unpacked_without_limit():
    packed, pixels = zlib.compress(bytes(2**25), 9), (b"IDAT", zlib.compress(bytes(5 * 4)))
    for kind, head in ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")):
        try:
            assert decode_image(png(4, 4, (kind, head + packed), pixels), 100).size == (4, 4)
        except BrokenImage as error:
            assert "too large" in str(error)
    image = decode_image(png(4, 4, (b"IDAT", zlib.compress(bytes(2**27), 9))), 100)
    assert image.size == (4, 4) and image.tobytes() == bytes(48)
