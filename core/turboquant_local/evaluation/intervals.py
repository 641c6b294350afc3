"""Confidence intervals of a mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import lru_cache

import torch


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t-interval of the mean of independent values; None for fewer than two.

    Args:
        values: One value a window or sample.
        confidence: Probability that the interval covers the mean.
    """
    if len(values) < 2:
        return None
    half = t_quantile((1 + confidence) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


@lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t-distribution, to four digits.

    With t = sqrt(degrees) tan(a), the density of a is proportional to cos(a)^(degrees - 1) on (-pi/2, pi/2).

    Args:
        probability: Between 0.5 and 1.
        degrees: Degrees of freedom, 1 or more.
    """
    angles = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    midpoints = (angles[1:] + angles[:-1]) / 2
    mass = torch.cos(midpoints).pow(degrees - 1).cumsum(0)
    angle = angles[1 + torch.searchsorted(mass, (2 * probability - 1) * mass[-1])]
    return math.sqrt(degrees) * math.tan(float(angle))
