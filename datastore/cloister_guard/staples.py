"""What a guard's evidence takes along of others': the processor's maker's collateral and the publisher's signed values.

Both are read anew for each evidence, so that the operator may replace the files under a running guard.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cloister_attest.collateral.items import Item
from cloister_attest.collateral.store import CollateralStore
from cloister_attest.reference_values import MAX_ENVELOPE
from cloister_data.errors import ConfigurationError
from cloister_data.policy import Platform


class Staples:
    """Reads what the configuration names; nothing of it is believed here."""

    def __init__(self, collateral: Path | None, reference_values: Path | None) -> None:
        self._store = None if collateral is None else CollateralStore(collateral)
        self._reference_values = reference_values

    def collateral(self, platform: Platform, report: bytes, certificates: Iterable[bytes]) -> tuple[Item, ...]:
        """The pieces at hand for an appraisal of this report. Raises ConfigurationError where a file is damaged."""
        return () if self._store is None else self._store.relevant(platform, report, certificates)

    def reference_values(self) -> bytes | None:
        """The publisher's envelope. Raises ConfigurationError where the file can't be read or is too large."""
        path = self._reference_values
        if path is None:
            return None
        try:
            with path.open("rb") as file:
                found = file.read(MAX_ENVELOPE + 1)
        except OSError as error:
            raise ConfigurationError(
                f"The reference values {path} can't be read.",
                why=f"{error.strerror}.",
                next_step="Put the publisher's signed file there, or correct reference_values.",
            ) from error
        if len(found) > MAX_ENVELOPE:
            raise ConfigurationError(
                f"The reference values {path} are too large.",
                why=f"{MAX_ENVELOPE} bytes are enough for any.",
                next_step="Put the publisher's signed file there, or correct reference_values.",
            )
        return found
