"""Figures of samples from the features of a network, in one pass."""

import sys

import numpy as np

from djepa_jax.evaluation.metrics import intervals, neighbours, scores
from djepa_jax.evaluation.metrics.base import MetricError
from djepa_jax.evaluation.metrics.moments import Moments, Statistics, frechet_distance
from djepa_jax.evaluation.metrics.reservoir import Reservoir

INCEPTION = "inception"
MAX_ROWS = 10_000  # that figures of neighbours, KID and MIND are taken of
TREND_BELOW, PUBLISHED = 10_000, 50_000  # samples


class FeatureFigures:
    """An accumulator of a network's features of samples, judged against those of real examples.

    Args:
        network: `Features.name`. "inception" gives `fid`, `sfid` and Inception Scores, another name
            `fd_<name>` and `sfd_<name>`.
        reference: features of real examples, as `Features` gives them. Figures of neighbours, KID
            and MIND look at `max_rows` of "pool", memorising at all of them. It may be empty: then
            there are the figures of `statistics` alone.
        statistics: mean and covariance of "pool" and "spatial" (`read_statistics`), where the
            reference is a part of the data only. Default: those of the reference.
        classifier: whether "logits" are of the classes that samples are asked for.
    """

    def __init__(
        self,
        network: str,
        reference: dict[str, np.ndarray],
        statistics: dict[str, Statistics] | None = None,
        classifier: bool = False,
        max_rows: int = MAX_ROWS,
        seed: int = 0,
    ):
        self._is_inception, self._is_classifier = network == INCEPTION, classifier
        self._names = {"pool": f"fd_{network}", "spatial": f"sfd_{network}"}
        if self._is_inception:
            self._names = {"pool": "fid", "spatial": "sfid"}
        self._real = dict(statistics or {})
        for tap in self._names:
            if tap in reference:
                self._check(tap, reference[tap], "real examples", 0)
                if tap not in self._real:
                    self._real[tap] = Moments(reference[tap])
        self._real_pool = reference.get("pool")
        self._max_rows, self._seed, self.count = max_rows, seed, 0
        self.moved: dict[str, np.ndarray] = {}
        self._moments = {tap: Moments() for tap in self._real}
        self._rows = {tap: Reservoir(max_rows, seed) for tap in self._real}
        self._rows |= {name: Reservoir(sys.maxsize) for name in ("logits", "correct")}

    def update(
        self,
        features: dict[str, np.ndarray],
        labels: np.ndarray | None = None,
        start: int | None = None,
    ) -> None:
        """Take in features of samples and the labels `[n]` that were asked for.

        Accumulators that are to be merged are told by `start` which of all samples the first is;
        without it, samples follow one another.

        Raises:
            MetricError: values are not finite, or not of the reference's size.
        """
        if missing := self._real.keys() - features.keys():
            raise MetricError(
                f"the network gives no {missing.pop()} features, which the statistics to judge by "
                "are of; take statistics of the same network."
            )
        start = self.count if start is None else start
        for tap, rows in features.items():
            self._check(tap, rows, "samples", start)
        for tap, moments in self._moments.items():
            moments.update(features[tap])
            self._rows[tap].update(features[tap], start)
        if self._is_inception and "logits" in features:
            self._rows["logits"].update(features["logits"], start)
        if self._is_classifier and labels is not None:
            correct = features["logits"].argmax(axis=1) == np.asarray(labels)
            self._rows["correct"].update(correct, start)
        self.count += len(features["pool"])

    def merge(self, other: "FeatureFigures") -> None:
        """Take in what another one has, made with the same arguments."""
        for mine, others in ((self._moments, other._moments), (self._rows, other._rows)):
            for name, each in mine.items():
                each.merge(others[name])
        self.count += other.count

    def state(self) -> dict[str, np.ndarray]:
        """What it has taken in, as arrays by name."""
        state = {"count": np.asarray(self.count)}
        for path, part in self._parts().items():
            state |= {f"{path}/{name}": array for name, array in part.state().items()}
        return state

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on from what `state` gave, of one that was made with the same arguments."""
        self.count = int(state["count"])
        for path, part in self._parts().items():
            own = {name: array for name, array in state.items() if name.startswith(f"{path}/")}
            part.restore({name.removeprefix(f"{path}/"): array for name, array in own.items()})

    def _parts(self) -> dict[str, Moments | Reservoir]:
        rows = {f"rows/{name}": each for name, each in self._rows.items()}
        return {f"moments/{tap}": each for tap, each in self._moments.items()} | rows

    def result(self) -> dict[str, float]:
        """The figures by name; `<name>_low` and `<name>_high` bound 95 % intervals.

        `moved` then has, of distances and scores, how far each sample moves them.

        Raises:
            MetricError: there are fewer than two samples.
        """
        figures = self.trend()
        return figures if self._real_pool is None else figures | self._of_rows() | self._floor()

    def trend(self) -> dict[str, float]:
        """Those of the figures that look at no neighbours."""
        figures, self.moved = {}, {}
        for tap, samples in self._moments.items():
            name, rows = self._names[tap], self._rows[tap].rows()
            distance, self.moved[name] = intervals.frechet(rows, samples, self._real[tap])
            low, high = intervals.first_order(distance, self.moved[name], self.count)
            figures |= _bounded(name, distance, (max(low, 0.0), high))
        if (logits := self._rows["logits"].rows()) is not None:
            self.moved["inception_score"] = scores.inception_moved(logits)
            figures |= _score("inception_score", scores.inception_scores_adm(logits))
            if len(logits) >= scores.FIDELITY_SPLITS:
                parts = scores.inception_scores_fidelity(logits)
                figures |= _score("inception_score_fidelity", parts)
        if (correct := self._rows["correct"].rows()) is not None:
            self.moved["accuracy"] = correct
            figures |= _mean("accuracy", correct)
        if self._real_pool is not None:
            samples, part = self._rows["pool"].rows(), self._real_part()
            figures["mind"] = scores.mind(samples, part, self._seed)
        return figures

    def _real_part(self) -> np.ndarray:
        chosen = np.random.default_rng(self._seed).permutation(len(self._real_pool))
        return self._real_pool[np.sort(chosen[: self._max_rows])]

    def _floor(self) -> dict[str, float]:
        """Distances of as many real examples as there are samples to the others."""
        if self._floor_count < 2:
            return {}
        order = np.random.default_rng(self._seed).permutation(len(self._real_pool))
        halves = np.split(order, [self._floor_count])
        a, b = (Moments(self._real_pool[half]) for half in halves)
        distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
        rows = (self._real_pool[half[: self._max_rows]] for half in halves)
        mind = scores.mind(*rows, self._seed)
        return {f"{self._names['pool']}_real": distance, "mind_real": mind}

    @property
    def _floor_count(self) -> int:
        return min(self.count, len(self._real_pool) // 2)

    def _of_rows(self) -> dict[str, float]:
        samples, real, part = self._rows["pool"].rows(), self._real_pool, self._real_part()
        figures, count = {}, min(len(samples), len(part))
        if count > neighbours.DENSITY_K:
            for name, rows in neighbours.manifold_rows(samples, part).items():
                figures |= _mean(name, rows)
            figures |= neighbours.memorising(samples, real, part)
        if count >= scores.KID_SUBSET_SIZE:
            distances = scores.kernel_distances(samples, part)
            figures["kid"] = float(distances.mean())
            if count > scores.KID_SUBSET_SIZE:
                bounds = intervals.subsampling(distances, scores.KID_SUBSET_SIZE, count)
                figures |= _bounded("kid", figures["kid"], bounds)
        return figures

    def caveats(self) -> list[str]:
        """What a reader of the figures is to be told."""
        found, real = [], 0 if self._real_pool is None else len(self._real_pool)
        if self.count < TREND_BELOW:
            found.append(f"{self.count} samples show a trend only, figures take {TREND_BELOW}")
        elif self.count < PUBLISHED:
            found.append(f"{self.count} samples, published figures take {PUBLISHED}")
        found += [
            f"{self._names[tap]}: {self.count} samples are too few for {len(each.mean)} dimensions"
            for tap, each in self._real.items()
            if self.count <= len(each.mean)
        ]
        if not real:
            found.append("statistics alone give no figures of neighbours, KID and MIND")
        elif max(self.count, real) > self._max_rows:
            found.append(f"neighbours, KID and MIND are of {self._max_rows} rows at most")
        if real and 2 <= self._floor_count < self.count:
            found.append(
                f"{self._names['pool']}_real and mind_real are of {self._floor_count} real "
                f"examples, half of all, and would be lower of {self.count}"
            )
        if 0 < min(self.count, real) <= neighbours.DENSITY_K:
            found.append(
                f"no precision, recall, density, coverage and nearest_real figures: they take "
                f"{neighbours.DENSITY_K + 1} samples and real examples"
            )
        if 0 < min(self.count, real) < scores.KID_SUBSET_SIZE:
            found.append(f"no KID: it takes {scores.KID_SUBSET_SIZE} samples and real examples")
        return found

    def _check(self, tap: str, rows: np.ndarray, of: str, start: int) -> None:
        if tap in self._real and rows.shape[1:] != (shape := self._real[tap].mean.shape):
            raise MetricError(
                f"{tap} features of {of} have the shape {rows.shape[1:]}, the statistics to judge "
                f"by {shape}; take statistics of the same network."
            )
        if len(bad := np.flatnonzero(~np.isfinite(rows).all(axis=1))):
            raise MetricError(
                f"{tap} features of {len(bad)} of {len(rows)} {of} are not finite, first of number "
                f"{start + bad[0]}; look at these pictures."
            )


def _bounded(name: str, value: float, bounds: tuple[float, float]) -> dict[str, float]:
    return {name: value, f"{name}_low": bounds[0], f"{name}_high": bounds[1]}


def _mean(name: str, rows: np.ndarray) -> dict[str, float]:
    return _bounded(name, float(rows.mean()), intervals.bootstrap(rows))


def _score(name: str, parts: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over parts, and an interval where there are several."""
    figures = {name: float(parts.mean()), f"{name}_std": float(parts.std())}
    return figures | _mean(name, parts) if len(parts) > 1 else figures
