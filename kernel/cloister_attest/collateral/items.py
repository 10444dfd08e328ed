"""One piece of collateral, as the processor's maker publishes it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cloister_data.base import Wire

Kind = Literal[
    "amd-ark",
    "amd-ask",
    "amd-asvk",
    "amd-vcek",
    "amd-crl",
    "intel-root-crl",
    "intel-pck-crl",
    "intel-tcb-info",
    "intel-qe-identity",
]

MAX_CONTENT = 8 << 20
MAX_CHAIN = 32 << 10
MAX_ITEMS = 16


class Item(Wire):
    """A piece of collateral.

    Attributes:
        kind: what it is.
        name: which of its kind. The product of an "amd-ark", "amd-ask", "amd-asvk" or "amd-crl" (Milan, Genoa, Turin);
            the hardware id and the TCB_VERSION of an "amd-vcek", both in hex with "-" between; "root" of
            "intel-root-crl"; "platform" or "processor" of "intel-pck-crl"; the FMSPC in hex of "intel-tcb-info"; "td"
            of "intel-qe-identity".
        content: DER of a certificate or of a revocation list, or Intel's JSON document as it came.
        chain: the signing chain of Intel's JSON documents, PEM, signer first; empty for the other kinds.
    """

    kind: Kind
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,160}$")]
    content: bytes = Field(min_length=1, max_length=MAX_CONTENT)
    chain: bytes = Field(max_length=MAX_CHAIN)


Items = Annotated[tuple[Item, ...], Field(max_length=MAX_ITEMS)]
