"""What a metric is: an accumulator of samples whose parts can be merged."""

from typing import Any, Protocol

import numpy as np

from djepa_jax.runtime.errors import UserError


class MetricError(UserError):
    """Samples or reference statistics that cannot be judged, or judged by."""


class NotFiniteError(MetricError):
    """Samples that are not finite, which all processes find at once."""


class Metric(Protocol):
    """Judges samples; records, log lines and model cards print what `result` returns."""

    @classmethod
    def from_data(cls, source) -> "Metric":
        """An empty accumulator that judges against the data of a source.

        Raises:
            ValueError: the data cannot be used for it; the message says what to do.
        """

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Take in samples as the modality exports them, and what was asked for, leading axis n."""

    def merge(self, other: "Metric") -> None:
        """Take in what another accumulator has."""

    def result(self) -> dict[str, float]:
        """The figures by name; `<name>_low` and `<name>_high` bound that of `<name>`.

        A metric may also have `given(count)`: pairs of an accumulator and of tokens (`Known`) that
        are given to as many further samples, which it takes in; `details()`: what a reader of them
        must know, for the record; and `state()`, arrays by name with the "count" of samples among
        them, and `restore(state)`, so that an evaluation that was killed can go on; `trend()`,
        those of the figures that take little time, for evaluations in the midst of a training; and,
        after `result`, `moved`, arrays `[n]` by the names of figures that tell how far each sample
        moved them, of which a search compares two in pairs. One that learns has
        `from_settings(source, evaluation, folder)` in place of `from_data`.
        """
