"""Student's t: how wide the interval of a mean over few seeds is. Without numpy: the report needs none."""

from __future__ import annotations

import math

LEVEL = 0.95
"""Of all intervals."""


def student_quantile(freedom: float, level: float = LEVEL) -> float:
    """The t that a Student variable stays below in absolute value with probability `level`.

    By bisection on Simpson's integral of the density, with the substitution t = sqrt(freedom) tan(u).
    """
    # density in u: c cos(u)^(freedom - 1) on (-pi/2, pi/2)
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)

    def inside(u: float) -> float:
        heights = [math.pow(math.cos(u * i / 2000), freedom - 1) for i in range(2001)]
        simpson = heights[0] + heights[-1] + 4 * sum(heights[1::2]) + 2 * sum(heights[2:-1:2])
        return math.exp(log_c) * 2 * simpson * u / 6000

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
