"""Several metrics that judge the same samples."""

from typing import Any

import numpy as np

from djepa_jax.evaluation.metrics.base import Metric

ENDINGS = ("_low", "_high", "_std", "_real")  # of figures that stand beside another one


class Several:
    """Metrics by kind, as one; what a later one calls as an earlier one does is `<name>_<kind>`."""

    def __init__(self, metrics: dict[str, Metric]):
        self.metrics = metrics

    def update(self, arrays: dict[str, np.ndarray], conditions: Any) -> None:
        """Give all of them samples."""
        for metric in self.metrics.values():
            metric.update(arrays, conditions)

    def given(self, count: int) -> list[tuple]:
        """What those ask for that judge samples beside given tokens."""
        asking = [each for each in self.metrics.values() if hasattr(each, "given")]
        return [one for each in asking for one in each.given(count)]

    def merge(self, other: "Several") -> None:
        """Take in what others of the same kinds have."""
        for kind, metric in self.metrics.items():
            metric.merge(other.metrics[kind])

    def state(self) -> dict[str, np.ndarray]:
        """What all have taken in."""
        state = {}
        for kind, metric in self.metrics.items():
            own = metric.state()
            state |= {"count": own["count"]} | {f"{kind}/{key}": own[key] for key in own}
        return state

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        for kind, metric in self.metrics.items():
            own = {
                key.removeprefix(f"{kind}/"): state[key]
                for key in state
                if key.startswith(f"{kind}/")
            }
            metric.restore(own)

    def result(self) -> dict[str, float]:
        """The figures of all."""
        return _joined({kind: metric.result() for kind, metric in self.metrics.items()})

    def trend(self) -> dict[str, float]:
        """The few figures of those that have such, of others all."""
        return _joined({kind: trend_of(metric) for kind, metric in self.metrics.items()})

    @property
    def moved(self) -> dict[str, np.ndarray]:
        """How far each sample moves figures, of the first metric that tells it."""
        every = (getattr(metric, "moved", {}) for metric in self.metrics.values())
        return next(filter(None, every), {})

    def details(self) -> dict:
        """What each tells a reader, by its kind, and the caveats of all."""
        told = {k: each.details() for k, each in self.metrics.items() if hasattr(each, "details")}
        caveats = [text for about in told.values() for text in about.pop("caveats", [])]
        return told | {"caveats": list(dict.fromkeys(caveats))} if told else {}


def keeps_state(metric: Metric) -> bool:
    """Whether an evaluation that was killed can go on: by several metrics, if it could by each."""
    each = metric.metrics.values() if isinstance(metric, Several) else (metric,)
    return all(hasattr(one, "restore") for one in each)


def trend_of(metric: Metric) -> dict[str, float]:
    """The figures of a metric that take little time; all, where it does not tell them apart."""
    return getattr(metric, "trend", metric.result)()


def _joined(by_kind: dict[str, dict[str, float]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for kind, found in by_kind.items():
        taken = set(figures)
        for name, value in found.items():
            figure = figure_of(name, found)
            clashes = figure in taken
            figures[f"{figure}_{kind}{name.removeprefix(figure)}" if clashes else name] = value
    return figures


def figure_of(name: str, names) -> str:
    """The figure that a bound or the like stands beside; a figure itself."""
    for ending in ENDINGS:
        if name.endswith(ending) and name.removesuffix(ending) in names:
            return name.removesuffix(ending)
    return name
