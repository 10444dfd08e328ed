"""What is public about a training or an evaluation: figures that follow from the request, the schema and the model."""

from __future__ import annotations

from pydantic import Field

from cloister_data.base import Text, Wire


class PreparedFacts(Wire):
    """A training as it will run. `sample_rate` is the probability with which each unit is in a step's batch.

    `slots` is the fixed number of samples of one microbatch, `bytes_bound` an upper estimate of the gradients' memory.
    """

    parameters: int = Field(ge=0)
    trainable: int = Field(ge=1)
    outputs: int = Field(ge=1)
    units: int = Field(ge=1)
    steps: int = Field(ge=1)
    sample_rate: float = Field(gt=0, le=1)
    slots: int = Field(ge=1)
    bytes_bound: int = Field(ge=0)
    notes: tuple[Text, ...] = Field(default=(), max_length=16)


class RehearsalFigures(Wire):
    """What a rehearsal measured on mock rows: `seconds` for all the plan's steps, the process's peak resident bytes."""

    steps_run: int = Field(ge=1)
    seconds: float = Field(ge=0)
    memory_bytes: int = Field(ge=0)
    notes: tuple[Text, ...] = Field(default=(), max_length=16)


class EvaluationFacts(Wire):
    """How an evaluation's integer aggregate reads.

    The aggregate changes by at most `sensitivity` when one unit's data become a null (zero-out). The metric is
    `aggregate * step`; `step` holds the public number of units and, for `mse`, the target's declared range.
    """

    sensitivity: int = Field(ge=1, le=2**62)
    step: float = Field(gt=0)
    units: int = Field(ge=1)
    outputs: int = Field(ge=1)
