"""What samples are asked for: from words of `config.sample` to raw conditions, and to titles."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from djepa_jax.config.class_names import find_class, find_mixture, split_regions
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.settings import SampleSettings
from djepa_jax.core.models.conditioning import Classes, Conditioner, Sum
from djepa_jax.core.models.text import Reader, Text


def wanted(sample: SampleSettings, conditioner: Conditioner, names: Sequence[str]) -> Any:
    """Raw conditions of all samples, `[count]`: labels or prompts that are asked for in turn, or a
    mix. Without a prompt, models of texts are told nothing.

    Raises:
        ConfigError: a class that is not among the `names`, a mix or a prompt that cannot be.
    """
    if sample.mix:
        return _mixed(sample, conditioner, names)
    text, count = sample.labels, sample.count
    if sample.prompt:
        try:
            found = of_prompts(conditioner, sample.prompt.split("|"))
        except ValueError as error:
            raise ConfigError(f"config.sample.prompt is {sample.prompt!r}; {error}") from error
        return found[np.arange(count) % len(found)]
    if isinstance(conditioner, Reader) and text != "all":
        raise ConfigError(
            f"config.sample.labels is {text!r}, and this model has no classes; it is told by "
            '--config.sample.prompt="a red circle".'
        )
    if text[:1] + text[-1:] in ("[]", "()"):  # as lists are written elsewhere
        text = text[1:-1]
    if text == "all":
        return conditioner.in_turn(count)
    try:
        words = [text] if text in names else text.split(",")
        labels = [find_class(word, names) for word in words]
    except ValueError as error:
        raise ConfigError(f'config.sample.labels is {text!r}; {error} Or write "all".') from error
    return of_labels(conditioner, np.resize(np.asarray(labels, np.int32), count), len(labels))


def _mixed(sample: SampleSettings, conditioner: Conditioner, names: Sequence[str]) -> Any:
    """Conditions of a mixture `[count, K, ...]`, and their weights `[count, K]`; of regions no
    weights.
    """

    def find(name: str):
        if isinstance(conditioner, Text):
            return of_prompts(conditioner, [name])[0]
        return np.int32(find_class(name, names))

    try:
        if not isinstance(conditioner, Classes | Text):
            raise ValueError('it is for model.condition "classes" or "text".')
        if "@" in sample.mix:
            asked = np.stack([find(name) for name, _ in split_regions(sample.mix)])  # [R, ...]
            return np.repeat(asked[None], sample.count, axis=0)
        mixture = find_mixture(sample.mix, find)
        return tuple(np.repeat(array[None], sample.count, axis=0) for array in mixture)
    except ValueError as error:
        raise ConfigError(f"config.sample.mix is {sample.mix!r}; {error}") from error


def of_labels(conditioner: Conditioner, labels: np.ndarray, period: int = 1) -> Any:
    """Raw conditions of labels `[n]`; of pairs, with another second label each `period`."""
    return conditioner.pair(labels, period) if isinstance(conditioner, Sum) else labels


def of_prompts(conditioner: Conditioner, prompts: Sequence[str]) -> np.ndarray:
    """Raw conditions `[n, L]` of prompts.

    Raises:
        ValueError: the model reads none, or one is empty or too long.
    """
    if not isinstance(conditioner, Text):
        remedy = "outputs of a text encoder, by conditions= in Python"
        remedy = remedy if isinstance(conditioner, Reader) else "classes by labels"
        raise ValueError(f"this model reads no texts; ask for {remedy}.")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{prompt!r} is no prompt; write what is to be seen.")
        if (size := conditioner.size(prompt.strip())) > conditioner.length:
            raise ValueError(
                f"{prompt[:20]!r}... has {size} bytes, the model reads {conditioner.length}; "
                "shorten it."
            )
    return np.stack([conditioner.encode(prompt.strip()) for prompt in prompts])


def titles(
    sample: SampleSettings, conditioner: Conditioner, names: Sequence[str], conditions: Any
) -> list[str]:
    """What to write above samples: class names, or their numbers; of pairs, second labels follow.

    Of a mixture, the words that asked for it, and of texts they themselves.
    """
    array, *further = map(np.asarray, jax.tree.leaves(conditions))
    if sample.mix:
        return [sample.mix] * len(array)
    if isinstance(conditioner, Text):
        return [conditioner.decode(row) for row in array]
    if array.ndim == 1 and array.dtype.kind in "iu" and len(array) and array.max() < len(names):
        first = [names[label] for label in array]
        return ["/".join(map(str, words)) for words in zip(first, *further, strict=True)]
    return [str(index) for index in range(len(array))]
