"""The values that trust files are made of, and the words that errors say about them."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, StringConstraints
from pydantic.fields import FieldInfo

from cloister_data.base import Digest

Any = Literal["any"]
"""Everything is accepted: the only way in which a check isn't made."""

Published = Literal["published"]
"""What the publisher of the images signed (`cloister_attest.reference_values`) is accepted."""

Measurement = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{96}$"), Field(description="48 bytes in lower-case hex")
]
"""SHA-384 in hex: 48 bytes, the size of SEV-SNP's MEASUREMENT and of TDX's MRTD and RTMRs."""

Measurements = Annotated[tuple[Measurement, ...], Field(min_length=1, max_length=256)]

ChipId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$"), Field(description="64 bytes in lower-case hex")]
"""64 bytes in hex, the size of SEV-SNP's CHIP_ID."""

Roots = (
    Annotated[
        tuple[Annotated[Digest, Field(description="SHA-256 in lower-case hex")], ...],
        Field(min_length=1, max_length=16),
    ]
    | Literal["vendor"]
)
"""SHA-256 of the DER root certificates that may vouch, or "vendor": the maker's own that this program carries."""


def accepts(accepted: tuple[str, ...] | str, shown: str) -> bool:
    """Whether `shown` is one of the values listed. A word such as "any" or "published" lists none."""
    return not isinstance(accepted, str) and shown in accepted


def expectation(model: type[BaseModel], key: str) -> str:
    """What the key of a trust file must be, for people."""
    field = model.model_fields.get(key)
    return "a table" if field is None else " or ".join(dict.fromkeys(_words(field.annotation, field.metadata, field)))


def _words(annotation: object, metadata: object = (), field: FieldInfo | None = None) -> Iterator[str]:
    if field is not None and field.description:
        yield field.description
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        described = [each.description for each in arguments[1:] if isinstance(each, FieldInfo) and each.description]
        if described:
            yield described[0]
        else:
            yield from _words(arguments[0], arguments[1:])
    elif origin in (Union, types.UnionType):
        for each in arguments:
            yield from _words(each)
    elif origin is Literal:
        yield from (f'"{each}"' if isinstance(each, str) else str(each) for each in arguments)
    elif origin is tuple:
        yield f"a list of {' or '.join(_words(arguments[0]))}"
    else:
        yield {int: "a whole number", str: "a text"}.get(annotation, "a table")  # type: ignore[call-overload]
