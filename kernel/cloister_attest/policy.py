"""The trust file: what a client demands of a machine before it sends anything."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cloister_attest.fields import Any as AnyValue
from cloister_attest.fields import expectation
from cloister_attest.reference_values import ImageValues, Publisher
from cloister_attest.simulated.policy import SimulatedPolicy
from cloister_attest.snp.policy import SnpPolicy
from cloister_attest.tdx.policy import TdxPolicy
from cloister_data.base import Wire
from cloister_data.errors import ConfigurationError
from cloister_data.policy import Platform

LogKey = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{64}$"), Field(description="a 32-byte key in lower-case hex")
]

HardwarePolicy = SimulatedPolicy | SnpPolicy | TdxPolicy

_PUBLISHED: dict[Platform, dict[str, str]] = {
    "simulated": {"measurements": "measurement"},
    "sev-snp": {"measurements": "measurement"},
    "tdx": {name: name for name in ("mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3")},
}
"""The keys that may be "published", and the publisher's value that then counts."""

FORMAT = 2
MAX_TRUST_FILE = 1 << 20
MAX_DOTS = 100


class AttestationPolicy(Wire):
    """A trust file. Every field is there, and accepts everything only by the explicit word "any".

    Attributes:
        format: of the file.
        publisher: whose signed reference values say which images may run, where `hardware` says "published"; or "none",
            where `hardware` itself lists them.
        gpu: "required", "forbidden", or "any" where no GPU's evidence is looked at.
        log_key: the audit log's key, or "any": the key that the evidence itself binds.
        log_origin: the audit log's name, or "any".
        hardware: the only platform that is believed, and what is demanded of it.
    """

    model_config = ConfigDict(strict=True)

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT, description=str(FORMAT))]
    publisher: Publisher | Literal["none"]
    gpu: Literal["required", "forbidden", "any"]
    log_key: LogKey | AnyValue
    log_origin: (
        Annotated[str, StringConstraints(min_length=1, max_length=256), Field(description="the log's name")] | AnyValue
    )
    hardware: Annotated[HardwarePolicy, Field(discriminator="platform")]

    @property
    def platform(self) -> Platform:
        return self.hardware.platform

    @model_validator(mode="after")
    def _published_by_somebody(self) -> Self:
        if bool(self._published()) != (self.publisher != "none"):
            raise ValueError("a publisher, and values that are published, go together")
        return self

    def _published(self) -> tuple[str, ...]:
        return tuple(key for key in _PUBLISHED[self.platform] if getattr(self.hardware, key) == "published")

    def with_published(self, image: ImageValues, shown: ImageValues) -> HardwarePolicy | None:
        """`hardware` with the values of `image` in the place of "published".

        None where the machine shows other values than this image's: an image's values count together, never mixed
        with another's.
        """
        if not image.platform == shown.platform == self.platform:
            return None
        names = {key: _PUBLISHED[self.platform][key] for key in self._published()}
        values = {key: getattr(image, name) for key, name in names.items()}
        if values != {key: getattr(shown, name) for key, name in names.items()}:
            return None
        return self.hardware.model_copy(update={key: (value,) for key, value in values.items()})

    def demanding(self, **changes: Any) -> Self:
        """A copy that demands something else of the hardware."""
        return self.model_copy(update={"hardware": self.hardware.model_copy(update=changes)})

    @classmethod
    def from_toml(cls, text: str, name: str = "the trust file") -> Self:
        """Raises ConfigurationError that names the first wrong key."""
        try:
            _shallow(text)
            # Through JSON, where pydantic's strict mode knows arrays; TOML's dates have no place in a trust file.
            return cls.from_json(json.dumps(tomllib.loads(text)))
        except ValidationError as error:
            key, why = _reason(error)
            raise ConfigurationError(
                f"The trust file {name} is wrong at {key!r}.",
                why=why,
                next_step='Every key must be there; "any" accepts everything where the key allows it.',
            ) from error
        except (tomllib.TOMLDecodeError, TypeError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"The trust file {name} isn't TOML that this program reads.",
                why=f"{error}.",
                next_step="Ask the operator of the cloister for the file again.",
            ) from error

    def to_toml(self) -> str:
        """The file that `from_toml` reads back as the same policy."""
        document = self.model_dump(mode="json")
        tables = {key: value for key, value in document.items() if isinstance(value, dict)}
        lines = [
            "# What this client demands of the machine before it sends anything.",
            '# Every key must be there; "any" accepts everything.',
            *(f"{key} = {_toml(value)}" for key, value in document.items() if key not in tables),
        ]
        for name, table in tables.items():
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        return "\n".join(lines) + "\n"


def load_policy(path: Path) -> AttestationPolicy:
    """Read a trust file. Raises ConfigurationError that names the file and the first wrong key."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                raise ConfigurationError(
                    f"Anybody on this computer may change the trust file {path}.",
                    why="Whoever changes it decides which machine gets your password and your data.",
                    next_step=f"Compare it with the operator's, then close it: chmod o-w {path}.",
                )
            content = file.read(MAX_TRUST_FILE + 1)
        if len(content) > MAX_TRUST_FILE:
            raise ConfigurationError(f"The trust file {path} is larger than {MAX_TRUST_FILE} bytes.")
        return AttestationPolicy.from_toml(content.decode("utf-8"), str(path))
    except OSError as error:
        raise ConfigurationError(
            f"The trust file {path} can't be read.",
            why=f"{error.strerror}.",
            next_step="Name the operator's trust file: cloister connect URL --trust FILE.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"The trust file {path} isn't TOML.", why="It isn't UTF-8.") from error


def _toml(value: object) -> str:
    """JSON's strings, numbers and arrays are TOML's too; a table in one line isn't."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # TOML has no surrogates, by which JSON's escapes write what is beyond U+FFFF; of DEL it has the escape alone.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _shallow(text: str) -> None:
    """Raises ValueError for a key of many parts: tomllib's time grows with the square of their number."""
    # Lines as TOML has them: Python knows more line ends, which may stand inside of a key's quotes.
    if any(line.count(".") > MAX_DOTS for line in text.split("\n")):
        raise ValueError(f"a line has more than {MAX_DOTS} dots")


_MODELS: dict[str, type[BaseModel]] = {"simulated": SimulatedPolicy, "sev-snp": SnpPolicy, "tdx": TdxPolicy}


def _reason(error: ValidationError) -> tuple[str, str]:
    """The first wrong key with the table it stands in, and what it must be."""
    first = error.errors(include_url=False, include_input=False)[0]
    path, kind = [str(part) for part in first["loc"]], first["type"]
    if not path:
        return "publisher", 'It must name who publishes the images where a value is "published", and only then.'
    if path[0] == "hardware":
        if kind.startswith("union_tag"):
            return "hardware.platform", 'It must be "simulated", "sev-snp" or "tdx".'
        return (
            _told(_MODELS[path[1]], path[2:], "hardware", kind)
            if len(path) > 1
            else _told(AttestationPolicy, path, "", kind)
        )
    if path[0] == "publisher" and path[1:2] == ["Publisher"] and len(path) > 2:
        return _told(Publisher, path[2:], "publisher", kind)
    if path == ["format"] and kind in ("less_than_equal", "greater_than_equal"):
        return "format", f"It is of another version of Cloister than this one, which reads format {FORMAT}."
    return _told(AttestationPolicy, path, "", kind)


def _told(model: type[BaseModel], path: list[str], table: str, kind: str) -> tuple[str, str]:
    if not path:
        return table, "It must be a table, with every key in it."
    key = f"{table}.{path[0]}" if table else path[0]
    if len(path) > 1 and (inner := model.model_fields.get(path[0])) is not None:
        nested = inner.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            return _told(nested, path[1:], key, kind)
    if kind == "extra_forbidden":
        return ".".join([key, *path[1:]]), "There is no such key."
    if kind == "missing" and len(path) > 1:
        return ".".join([key, *path[1:]]), "The key is missing."
    opening = "The key is missing: it" if kind == "missing" else "It"
    return key, f"{opening} must be {expectation(model, path[0])}."
