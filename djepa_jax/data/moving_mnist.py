"""Moving MNIST (Srivastava et al., 2015), made on the fly: digits that bounce off the walls."""

import numpy as np
from PIL import Image

from djepa_jax.data.arrays import load_digits, load_npz
from djepa_jax.data.records import DataError, Source, checksum

SEED = 0
REFERENCE_SIDE = 64  # pixels of a frame in which `digit_size` is counted
STEP = 0.1  # from frame to frame, as a share of the way from wall to wall


class MovingMNIST(Source):
    """Clips of digits on straight lines, the brightest where they overlap.

    Clip i is a function of i, the digits and the options alone; its condition is the label of its
    first digit.

    Args:
        path: an npz file of digits, `images` `[n, H, W]` and `labels`; "" for scikit-learn's.
        modality: of the clips `[T, H, W, C]`.
        num_classes: not used; labels are those of the digits.
        num_digits: in a clip.
        digit_size: side of a digit in a frame of 64 pixels, scaled to other frames.
        num_clips: how many there are.
    """

    def __init__(
        self, path, modality, num_classes=0, *, num_digits=2, digit_size=28, num_clips=60_000
    ):
        options = {"num_digits": (num_digits, 16), "digit_size": (digit_size, REFERENCE_SIDE)}
        for name, (value, most) in (options | {"num_clips": (num_clips, 2**31 - 1)}).items():
            if type(value) is not int or not 1 <= value <= most:
                raise DataError(
                    f"data.source_options.{name} is {value!r}; it must be a whole number from 1 to "
                    f"{most}."
                )
        self._shape = modality.example_shape
        if len(self._shape) != 4 or modality.example_dtype != np.uint8:
            raise DataError(
                'the source "moving_mnist" gives uint8 clips, the config expects '
                f"{modality.example_dtype} examples of shape {self._shape}; set "
                "--config.data.modality=video_pixels."
            )
        self._digits = load_npz(path, f'data.path "{path}"') if path else load_digits()
        if self._digits.images.dtype != np.uint8 or self._digits.images.shape[-1] != 1:
            raise DataError(
                f'data.path "{path}" holds {self._digits.images.dtype} images of shape '
                f"{self._digits.images.shape}; moving digits are uint8 [n, H, W]."
            )
        self.num_digits = num_digits
        self._side = max(1, round(digit_size * self._shape[1] / REFERENCE_SIDE))
        draws = np.random.default_rng(SEED).random((num_clips, num_digits, 4))
        self._chosen = (draws[..., 0] * len(self._digits)).astype(int)  # [n, digits]
        self._starts, self._angles = draws[..., 1:3], 2 * np.pi * draws[..., 3]
        self.labels = self._digits.labels[self._chosen[:, 0]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        frames, height, width, channels = self._shape
        velocity = STEP * np.stack([np.sin(self._angles[index]), np.cos(self._angles[index])], -1)
        way = self._starts[index] + velocity * np.arange(frames)[:, None, None]  # [T, digits, 2]
        place = 1 - np.abs(1 - way % 2)  # thrown back at 0 and 1
        corners = np.rint(place * (height - self._side, width - self._side)).astype(int)
        clip = np.zeros((frames, height, width), np.uint8)
        for number, digit in enumerate(self._chosen[index]):
            picture = Image.fromarray(self._digits.images[digit, ..., 0])
            picture = np.asarray(picture.resize((self._side, self._side), Image.Resampling.BICUBIC))
            for frame, (top, left) in zip(clip, corners[:, number], strict=True):
                part = frame[top : top + self._side, left : left + self._side]
                np.maximum(part, picture, out=part)
        clip = np.repeat(clip[..., None], channels, axis=-1)  # [T, H, W, C]
        return {"example": clip, "condition": np.int32(self.labels[index])}

    def digest(self) -> str:
        """A checksum of all that decides the clips."""
        return checksum(self._digits.digest(), repr((self._shape, self._side)), self._chosen)
