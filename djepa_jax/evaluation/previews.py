"""Examples of any modality as the pictures that people see, for judges of pictures."""

import dataclasses
from typing import Any

import jax
import numpy as np

from djepa_jax.core.modalities import Modality
from djepa_jax.core.modalities.programs import shown
from djepa_jax.data.records import Source


@dataclasses.dataclass(frozen=True)
class Previews(Source):
    """A source whose examples are what a modality shows of another's, with their first labels.

    Where it shows nothing, they are as they were.
    """

    source: Any
    modality: Modality

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        item = self.source[index]
        picture = preview(self.modality, item["example"][None])
        example = item["example"] if picture is None else picture[0]
        return {"example": example, "condition": jax.tree.leaves(item["condition"])[0]}


def preview(modality: Modality, examples: np.ndarray) -> np.ndarray | None:
    """What a modality shows of examples `[n, ...]`: uint8 `[n, H, W, C]`."""
    return modality.preview(jax.device_get(shown(modality, examples)))
