"""What samples are asked for: from words of `config.sample` to raw conditions, and to titles."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from djepa_jax.config.class_names import find_class, find_mixture
from djepa_jax.config.convert import ConfigError
from djepa_jax.config.settings import SampleSettings
from djepa_jax.core.models.conditioning import Classes, Conditioner, Sum


def wanted(sample: SampleSettings, conditioner: Conditioner, names: Sequence[str]) -> Any:
    """Raw conditions of all samples, `[count]`: the labels that are asked for in turn, or a mix.

    Raises:
        ConfigError: a class that is not among the `names`, or a mix that cannot be.
    """
    if sample.mix:
        return _mixed(sample, conditioner, names)
    text, count = sample.labels, sample.count
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


def _mixed(sample: SampleSettings, conditioner: Conditioner, names: Sequence[str]) -> tuple:
    """Labels and weights of a mixture, `[count, K]` both."""
    try:
        if not isinstance(conditioner, Classes):
            raise ValueError('it is for model.condition "classes".')
        return tuple(np.tile(array, (sample.count, 1)) for array in find_mixture(sample.mix, names))
    except ValueError as error:
        raise ConfigError(f"config.sample.mix is {sample.mix!r}; {error}") from error


def of_labels(conditioner: Conditioner, labels: np.ndarray, period: int = 1) -> Any:
    """Raw conditions of labels `[n]`; of pairs, with another second label each `period`."""
    return conditioner.pair(labels, period) if isinstance(conditioner, Sum) else labels


def titles(sample: SampleSettings, names: Sequence[str], conditions: Any) -> list[str]:
    """What to write above samples: class names, or their numbers; of pairs, second labels follow.

    Of a mixture, the words that asked for it.
    """
    array, *further = map(np.asarray, jax.tree.leaves(conditions))
    if sample.mix:
        return [sample.mix] * len(array)
    if array.ndim == 1 and array.dtype.kind in "iu" and len(array) and array.max() < len(names):
        first = [names[label] for label in array]
        return ["/".join(map(str, words)) for words in zip(first, *further, strict=True)]
    return [str(index) for index in range(len(array))]
