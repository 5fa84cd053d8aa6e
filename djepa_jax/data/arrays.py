"""Sources in memory: digits of scikit-learn, arrays of an npz file, made-up examples."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from djepa_jax.data.records import DataError, Source, checksum


class ArraySource(Source):
    """Examples `[n, ...]` with their labels `[n]`, or two kinds of them, which make pairs."""

    def __init__(self, images: np.ndarray, *labels: np.ndarray):
        self.images, self.all_labels = images, [np.asarray(each, np.int64) for each in labels]
        self.labels = self.all_labels[0]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        first, *second = (np.int32(labels[index]) for labels in self.all_labels)
        return {"example": self.images[index], "condition": (first, *second) if second else first}

    def digest(self) -> str:
        """A checksum of all images and labels."""
        return checksum(self.images, *self.all_labels)


def load_digits() -> ArraySource:
    """The 1,797 handwritten 8 x 8 digits of scikit-learn, 0..16 spread over 0..255."""
    from sklearn import datasets  # a second of import that other sources do not need

    digits = datasets.load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # [1797, 8, 8, 1]
    return ArraySource(images, digits.target)


def load_npz(path: str, where: str, names: Sequence[str] = ("labels",)) -> ArraySource:
    """Arrays `images` (or `latents`, or `clips` with all axes) of an npz file, and one or two of
    labels, by their names.

    A channel axis of images and latents may be absent. What is found as second labels is counted
    from 0. Without names, labels are those called "labels", or 0 where there are none.
    """
    told, kinds = " and ".join(f'"{name}"' for name in names), ("latents", "clips", "images")
    try:
        with np.load(path, allow_pickle=False) as file:
            kind = next((kind for kind in kinds if kind in file), "images")
            images = file[kind]
            if not names:
                names = ["labels"] * ("labels" in file)
            found = [file[name] for name in names]
            labels, *further = found or [np.zeros(len(images), np.int64)]
    except Exception as error:  # damaged files make numpy fail in ways that nobody has listed
        raise DataError(
            f'{where} is no npz file with arrays "images" (or "latents", or "clips") and {told}: '
            f"{error}"
        ) from error
    fitting = images.ndim in ((5,) if kind == "clips" else (3, 4))
    fitting = fitting and labels.ndim == 1 and labels.dtype.kind in "iu"
    fitting = fitting and all(each.shape == labels.shape for each in further)
    if not fitting or len(images) != len(labels) or not len(images):
        raise DataError(
            f"{where} holds {images.dtype} images of shape {images.shape} and {labels.dtype} "
            f"labels of shape {labels.shape}; it needs images [n, H, W, C], or clips "
            "[n, T, H, W, C], and one whole number for each as labels [n]."
        )
    if images.dtype.kind == "f" and not np.isfinite(images).all():
        raise DataError(f"{where} holds values that are not finite; remove those examples.")
    further = [np.unique(each, return_inverse=True)[1] for each in further]
    return ArraySource(images[..., None] if images.ndim == 3 else images, labels, *further)


class Synthetic(Source):
    """Noise around a value of the class; latents come as moments, as a latent cache has them."""

    def __init__(self, modality, num_classes: int, count: int = 512):
        self._modality, self.labels = modality, np.arange(count) % (num_classes or 10)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        label = int(self.labels[index])
        rng = np.random.default_rng(index)
        values = rng.standard_normal(self._modality.example_shape) + np.sin(1 + label)
        if self._modality.example_dtype == np.uint8:
            pixels = np.clip(128 + 40 * values, 0, 255).astype(np.uint8)
            return {"example": pixels, "condition": np.int32(label)}
        if not self._modality.needs_decoder:
            scale = 1000 if self._modality.example_dtype == np.int16 else 1
            example = (scale * values).astype(self._modality.example_dtype)
            return {"example": example, "condition": np.int32(label)}
        moments = np.concatenate([values, np.full(values.shape, -2.0)], -1).astype(jnp.bfloat16)
        return {"example": moments, "mirror": moments[..., ::-1, :], "condition": np.int32(label)}
