"""Discrete Laplace noise: how large it is (pure), and OpenDP's exact sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cloister_budget.calibrate import laplace_scale
from cloister_data.errors import InvalidRequestError
from cloister_data.mechanism import DiscreteLaplace

MIN_EPSILON = 1e-6
MAX_EPSILON = 1000.0


def check_epsilon(epsilon: float) -> None:
    """Raises InvalidRequestError for a NaN, an infinity, or a value outside [MIN_EPSILON, MAX_EPSILON]."""
    if not (math.isfinite(epsilon) and MIN_EPSILON <= epsilon <= MAX_EPSILON):
        raise InvalidRequestError(
            f"epsilon must be a number between {MIN_EPSILON:g} and {MAX_EPSILON:g}, not {epsilon!r}.",
            next_step="Nothing was charged. Typical values are 0.1 to 2.",
        )


def discrete_laplace(sensitivity: int, epsilon: float) -> DiscreteLaplace:
    """The mechanism with the smallest scale whose loss, sensitivity/scale in exact arithmetic, is at most `epsilon`.

    `epsilon` is read as its shortest decimal, as limits are: ten releases of 0.1 fit a limit of 1.
    """
    return DiscreteLaplace(sensitivity=sensitivity, scale=laplace_scale(sensitivity, epsilon))


def quantile(scale: float, confidence: float) -> int:
    """The smallest t with P(|X| <= t) >= confidence for X discrete Laplace.

    P(|X| > t) = 2 r^(t+1) / (1 + r) with r = e^(-1/scale) (Inusah and Kozubowski 2006).
    """
    r = math.exp(-1.0 / scale)
    tail = 1.0 - confidence
    if 2.0 * r / (1.0 + r) <= tail:
        return 0
    return max(0, math.ceil(scale * math.log(2.0 / ((1.0 + r) * tail))) - 1)


def add_noise(exact: Sequence[int], scale: float) -> list[int]:
    """`exact` (int64) plus independent discrete Laplace noise by OpenDP's exact sampler; saturates at int64's ends.

    Casacuberta, Shoemate, Vadhan, Wagaman 2022 (why floats are unsafe); Canonne, Kamath, Steinke 2020 (the sampler).
    """
    from opendp.domains import atom_domain, vector_domain
    from opendp.measurements import make_laplace
    from opendp.metrics import l1_distance
    from opendp.mod import enable_features

    enable_features("contrib")
    measurement = make_laplace(vector_domain(atom_domain(T="i64")), l1_distance(T="i64"), scale)
    return [int(value) for value in measurement([int(value) for value in exact])]
