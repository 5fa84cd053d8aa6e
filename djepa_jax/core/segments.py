"""Cutting the steps of sampling into segments: programs with static shapes, of least work."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from djepa_jax.core import flops
from djepa_jax.core.schedules import guided_steps

if TYPE_CHECKING:
    from djepa_jax.core.sampler import SamplerConfig


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps [start, stop) that share padded shapes: V visible places, K new ones.

    They have the token loss of the first of them, and guidance if one of them has: then the
    denoiser runs `halves` times, but for `unguided_calls` of its calls, and the networks in the
    steps `paired`, for A = `ahead` places.
    """

    start: int
    stop: int
    visible: int
    new: int
    halves: int
    denoiser_calls: int
    paired: tuple[int, ...]
    ahead: int
    unguided_calls: int


def plan_segments(config: "SamplerConfig") -> list[Segment]:
    """Cut the steps into at most `num_segments` runs of least work, by dynamic programming."""
    counts, known, every = config.counts, config.num_known, config.reuse_unconditional
    is_guided = (config.halves > 1) & guided_steps(len(counts), config.cfg_interval)  # [T]
    due = np.flatnonzero(is_guided)[::every].tolist()
    before = [known + sum(counts[:s]) for s in range(len(counts))]  # visible when step s starts

    @functools.cache
    def priced(start: int, stop: int) -> tuple[float, Segment]:
        """Work of one segment of these steps, and the segment."""
        new = max(counts[start:stop])
        loss = config.loss_at(start)
        calls = loss.denoiser_calls, getattr(loss, "unguided_calls", 0)
        guided = bool(is_guided[start:stop].any()) and calls[0] > calls[1]
        paired = tuple(range(start, stop) if guided else ())
        if every > 1:
            paired = tuple(s for s in due if guided and start <= s < stop)
        ahead = max([new, *(sum(counts[s : s + every]) for s in paired)])
        halves = config.halves if guided else 1
        shape = start, stop, before[stop - 1], new
        segment = Segment(*shape, halves, calls[0], paired, ahead, calls[1])
        return flops.padded_sample_image(config.model, [segment]), segment

    @functools.cache
    def best(stop: int, num_runs: int) -> tuple[float, tuple[Segment, ...]]:
        """The cheapest cutting of the first `stop` steps into at most `num_runs` runs."""
        if stop == 0 or num_runs == 0:
            return (0.0 if stop == 0 else math.inf), ()
        options = []
        for start in range(stop):
            total, runs = best(start, num_runs - 1)
            cost, segment = priced(start, stop)
            options.append((total + cost, (*runs, segment)))
        return min(options, key=lambda option: option[0])

    return list(best(len(counts), config.num_segments)[1])
