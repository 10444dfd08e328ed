"""Gaussian noise for clipped sums, exact on a lattice.

What is released is `round(x + G)`: x is the exact sum of the samples' clipped gradients and G a true Gaussian of
standard deviation noise_multiplier * C, rounded TOGETHER to a public lattice. That is post-processing of the
continuous Gaussian mechanism, so its accounting holds as it is: sensitivity C, with no term for the lattice (rounding
sum and noise apart would cost spacing * sqrt(d)). The lattice also closes the floating-point attacks of Mironov (CCS
2012).

G is sampled by Box-Muller from an AES stream. A draw is decided in float64 where every real pair of uniforms that
shares the drawn bits rounds to the same lattice point; else (about 2**-28 of the draws) further bits are drawn and it
is decided with 80 decimal digits. So the sampler's total variation error is below 2**-200 a draw.
"""

from __future__ import annotations

import decimal
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from cloister_guard.training.randomness import KeyedStream

FINE_BITS = 36
"""Clipped gradients are multiples of `fine`, a power of two with C / fine in [2**36, 2**37)."""

_COARSE_BITS = 16
_MAX_SHIFT = 50
_EXTRA_BITS = 256
_BLOCK = 1 << 18
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def fine_spacing(max_grad_norm: float) -> float:
    """The spacing of the lattice on which clipped gradients are summed, exactly."""
    return math.ldexp(1.0, math.frexp(max_grad_norm)[1] - 1 - FINE_BITS)


class LatticeGaussian:
    """Adds noise of standard deviation noise_multiplier * max_grad_norm to sums in units of `fine_spacing`.

    `spacing` is the released lattice's: a power of two, between 2**-17 and 2**-16 standard deviations.
    """

    def __init__(self, *, noise_multiplier: float, max_grad_norm: float) -> None:
        deviation = noise_multiplier * max_grad_norm
        if not (math.isfinite(deviation) and deviation > 0):
            raise ValueError("the noise must have a positive, finite deviation")
        fine_exponent = math.frexp(max_grad_norm)[1] - 1 - FINE_BITS
        exponent = max(math.frexp(deviation)[1] - 1 - _COARSE_BITS, fine_exponent)
        self._shift = min(exponent - fine_exponent, _MAX_SHIFT)
        self.spacing = math.ldexp(1.0, fine_exponent + self._shift)
        # Rounded up: the noise is never smaller than what was accounted.
        self._deviation = math.nextafter(deviation / self.spacing, math.inf)
        self._stream = KeyedStream()

    def release(self, sums: Integers) -> Integers:
        """`sums` (int64, any shape, units of `fine_spacing`) with noise, in units of `spacing`."""
        flat = sums.reshape(-1)
        noised = np.empty_like(flat)
        for start in range(0, flat.size, _BLOCK):
            noised[start : start + _BLOCK] = self._release(flat[start : start + _BLOCK])
        return noised.reshape(sums.shape)

    def _release(self, sums: Integers) -> Integers:
        whole = sums >> self._shift
        rest = sums - (whole << self._shift)
        fraction = np.ldexp(rest.astype(np.float64), -self._shift)
        pairs = (sums.size + 1) // 2
        words = self._stream.words(2 * pairs)
        normal, doubt = _box_muller(words[:pairs], words[pairs:], self._deviation)
        place = fraction + normal[: sums.size]
        nearest = np.rint(place)
        unsure = np.abs(np.abs(place - nearest) - 0.5) <= doubt[: sums.size]
        moves = nearest.astype(np.int64)
        for pair in sorted({int(at) % pairs for at in np.flatnonzero(unsure)}):
            exact = _exact_pair(int(words[pair]), int(words[pairs + pair]), self._deviation, self._stream)
            for at, value in zip((pair, pairs + pair), exact, strict=True):
                if at < sums.size:
                    moves[at] = _rounded(int(rest[at]), self._shift, value)
        return whole + moves


def _box_muller(
    first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64], deviation: float
) -> tuple[Floats, Floats]:
    """(2n normals, 2n bounds on their distance from the exact value) from n pairs of words, 53 bits of each.

    The bound covers the width of the cell that the drawn bits leave, and float64's errors with a wide margin (numpy's
    log, sin and cos are within 4 units in the last place, which is 2**-50).
    """
    uniform = ((first >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    angle = ((second >> np.uint64(11)).astype(np.float64) + 0.5) * (2.0**-53 * 2.0 * math.pi)
    radius = np.sqrt(-2.0 * np.log(np.minimum(uniform, 1.0 - 2.0**-53)))
    doubt = deviation * (radius * 2.0**-46 + 2.0**-52 / (uniform * radius)) + 2.0**-30
    # The cells next to 0 and to 1 are never decided here: the logarithm is too steep, or too flat, for a bound.
    doubt[(uniform < 2.0**-40) | (uniform > 1.0 - 2.0**-40)] = np.inf
    scaled = deviation * radius
    return np.concatenate((scaled * np.cos(angle), scaled * np.sin(angle))), np.concatenate((doubt, doubt))


def _exact_pair(first: int, second: int, deviation: float, stream: KeyedStream) -> tuple[Any, Any]:
    """The two normals as Decimals of 80 digits, with 256 further bits behind the 53 of each word."""
    with decimal.localcontext(decimal.Context(prec=80 + 40)):
        scale = decimal.Decimal(2) ** (53 + _EXTRA_BITS)
        uniforms = [
            (decimal.Decimal(((word >> 11) << _EXTRA_BITS) | stream.integer(_EXTRA_BITS)) + decimal.Decimal("0.5"))
            / scale
            for word in (first, second)
        ]
        radius = decimal.Decimal(deviation) * (-2 * uniforms[0].ln()).sqrt()
        cosine, sine = _cos_sin(2 * _pi() * uniforms[1])
        return radius * cosine, radius * sine


def _rounded(rest: int, shift: int, normal: Any) -> int:
    with decimal.localcontext(decimal.Context(prec=120)):
        place = decimal.Decimal(rest) / (1 << shift) + normal
        return int(place.to_integral_value(rounding=decimal.ROUND_HALF_EVEN))


def _pi() -> decimal.Decimal:
    """Machin: pi = 16 arctan(1/5) - 4 arctan(1/239), in the current context."""

    def arctan_inverse(n: int) -> decimal.Decimal:
        power = decimal.Decimal(1) / n
        total, sign, k = power, -1, 3
        while power > decimal.Decimal(10) ** -130:
            power /= n * n
            total += sign * power / k
            sign, k = -sign, k + 2
        return total

    return 16 * arctan_inverse(5) - 4 * arctan_inverse(239)


def _cos_sin(angle: decimal.Decimal) -> tuple[decimal.Decimal, decimal.Decimal]:
    """Taylor series in the current context; `angle` in [0, 2 pi]."""
    cosine, sine, term, k = decimal.Decimal(0), decimal.Decimal(0), decimal.Decimal(1), 0
    while abs(term) > decimal.Decimal(10) ** -120 or k < 8:
        match k % 4:
            case 0:
                cosine += term
            case 1:
                sine += term
            case 2:
                cosine -= term
            case _:
                sine -= term
        k += 1
        term = term * angle / k
    return cosine, sine
