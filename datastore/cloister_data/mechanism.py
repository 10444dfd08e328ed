"""The mechanisms whose losses the ledger knows. Pure data: the arithmetic is `cloister_budget.loss`.

Sensitivities are between neighbours (one unit's data replaced by a null), rounded up by whoever states them. What is
said of a mechanism holds for exact samplers; a sampler's own error is for its caller to account.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister_data.base import Wire


class Laplace(Wire):
    """A real answer plus Laplace noise with density ~ exp(-|x|/scale). Pure epsilon = sensitivity/scale.

    `sensitivity` is the L1 sensitivity of everything that is answered, in the answer's own unit, as is `scale`.
    """

    kind: Literal["laplace"] = "laplace"
    sensitivity: float = Field(gt=0, le=1e18)
    scale: float = Field(gt=0, le=1e18)


class DiscreteLaplace(Wire):
    """An integer answer plus discrete Laplace noise: P(k) ~ exp(-|k|/scale). Pure epsilon = sensitivity/scale.

    `sensitivity` is the L1 sensitivity in lattice steps, `scale` is in lattice steps too.
    """

    kind: Literal["discrete_laplace"] = "discrete_laplace"
    sensitivity: int = Field(ge=1, le=2**62)
    scale: float = Field(gt=0, le=1e18)


class Gaussian(Wire):
    """A real answer, or a vector, plus independent normal noise of standard deviation `sigma`.

    `sensitivity` is the L2 sensitivity of the whole vector, in the unit of `sigma`.
    """

    kind: Literal["gaussian"] = "gaussian"
    sensitivity: float = Field(gt=0, le=1e18)
    sigma: float = Field(gt=0, le=1e18)


class DiscreteGaussian(Wire):
    """Integers, each plus discrete Gaussian noise: P(k) ~ exp(-k^2 / (2 sigma^2)) (Canonne, Kamath and Steinke 2020).

    `sensitivity` is the L2 sensitivity of all `answers` integers together, in lattice steps, as is `sigma`.
    """

    kind: Literal["discrete_gaussian"] = "discrete_gaussian"
    sensitivity: float = Field(gt=0, le=1e18)
    sigma: float = Field(gt=0, le=1e18)
    answers: int = Field(ge=1, le=2**62)


class Exponential(Wire):
    """A choice with probability ~ exp(epsilon score / (2 sensitivity)); or the best score after Gumbel noise.

    It is `epsilon`-bounded range (Durfee and Rogers 2019): its privacy losses lie within `epsilon` of each other, which
    says more than pure epsilon. With monotonic scores the exponent is epsilon score / sensitivity.
    """

    kind: Literal["exponential"] = "exponential"
    epsilon: float = Field(gt=0, le=1000)


class ReportNoisyMax(Wire):
    """The index of the best score after (discrete) Laplace or exponential noise of scale 2 sensitivity / epsilon.

    It is pure `epsilon` (Dwork and Roth 2014, Claim 3.9; Ding et al. 2021), and not of bounded range.
    """

    kind: Literal["report_noisy_max"] = "report_noisy_max"
    epsilon: float = Field(gt=0, le=1000)


class ThresholdedHistogram(Wire):
    """Counts of the bins that occur, whatever they are called: noisy ones from `threshold` on are shown, others not.

    A unit adds 1 to `bins` bins at most; each count of at least 1 gets discrete Laplace noise of `scale`. A bin that
    one unit alone is in shows its existence with a small probability: the mechanism's direct delta (Korolova et al.
    2009).
    """

    kind: Literal["thresholded_histogram"] = "thresholded_histogram"
    bins: int = Field(ge=1, le=2**31)
    scale: float = Field(gt=0, le=1e18)
    threshold: int = Field(ge=1, le=2**62)


class DpSgd(Wire):
    """`steps` of the Poisson-subsampled Gaussian mechanism (Abadi et al. 2016; Mironov et al. 2019).

    `noise_multiplier` is sigma over the clipped sum's L2 sensitivity (the lattice's share is already in it),
    `sample_rate` the probability with which each unit is in a batch.
    """

    kind: Literal["dp_sgd"] = "dp_sgd"
    noise_multiplier: float = Field(gt=0, le=1e6)
    sample_rate: float = Field(gt=0, le=1)
    steps: int = Field(ge=1, le=10_000_000)


Single = (
    Laplace
    | DiscreteLaplace
    | Gaussian
    | DiscreteGaussian
    | Exponential
    | ReportNoisyMax
    | ThresholdedHistogram
    | DpSgd
)
"""Any mechanism that isn't made of others."""


class Composition(Wire):
    """Several mechanisms over the same units, all released."""

    kind: Literal["composition"] = "composition"
    parts: tuple[Annotated[Single, Field(discriminator="kind")], ...] = Field(min_length=1, max_length=64)


Mechanism = Annotated[Single | Composition, Field(discriminator="kind")]

Adjacency = Literal["zero-out"]
"""Neighbours replace one unit's data by a null; the number of units is public."""
