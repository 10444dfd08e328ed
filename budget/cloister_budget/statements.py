"""The few statements that every charge needs, compiled once. Everything else goes through the ORM.

Building, caching and binding a statement anew costs several times what the database takes to run one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Boolean, Dialect
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeDecorator, TypeEngine

Processor = Callable[[Any], Any] | None


@dataclass(frozen=True)
class _Compiled:
    """SQL as the driver takes it. `names` are the parameters, in their order where the driver counts them."""

    sql: str
    positional: bool
    names: tuple[str, ...]
    binding: tuple[Processor, ...]
    reading: tuple[Processor, ...]

    def parameters(self, values: Mapping[str, Any]) -> Any:
        bound = [
            values[name] if process is None else process(values[name])
            for name, process in zip(self.names, self.binding, strict=True)
        ]
        return tuple(bound) if self.positional else dict(zip(self.names, bound, strict=True))


class Statement:
    """One Core statement. `build` makes it, given the dialect's name, at its first use on each.

    Its parameters are all `bindparam`s (or an insert's columns), and none is expanding.
    """

    def __init__(self, build: Callable[[str], Any]) -> None:
        self._build = build
        self._compiled: dict[str, _Compiled] = {}

    def run(self, s: Session, values: Mapping[str, Any] | None = None) -> Sequence[tuple[Any, ...]]:
        """Execute it in the session's transaction; answers its rows. Every parameter needs a value."""
        connection = s.connection()
        compiled = self._for(connection.dialect)
        found = connection.exec_driver_sql(compiled.sql, compiled.parameters(values or {}))
        if not found.returns_rows:
            return ()
        return [
            tuple(value if read is None else read(value) for value, read in zip(row, compiled.reading, strict=True))
            for row in found.all()
        ]

    def change(self, s: Session, values: Mapping[str, Any]) -> int:
        """Execute it; answers how many rows it changed."""
        connection = s.connection()
        compiled = self._for(connection.dialect)
        return connection.exec_driver_sql(compiled.sql, compiled.parameters(values)).rowcount

    def run_many(self, s: Session, values: Sequence[Mapping[str, Any]]) -> None:
        """Execute it once for each mapping."""
        connection = s.connection()
        compiled = self._for(connection.dialect)
        connection.exec_driver_sql(compiled.sql, [compiled.parameters(each) for each in values])

    def _for(self, dialect: Dialect) -> _Compiled:
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = _compile(self._build(dialect.name), dialect)
        return found


def _compile(built: Any, dialect: Dialect) -> _Compiled:
    compiled = built.compile(dialect=dialect)
    names = tuple(compiled.positiontup if compiled.positional else compiled.binds)
    columns = built.selected_columns if built.is_select else getattr(built, "exported_columns", ())
    return _Compiled(
        str(compiled),
        bool(compiled.positional),
        names,
        tuple(compiled.binds[name].type.dialect_impl(dialect).bind_processor(dialect) for name in names),
        tuple(_reader(column.type, dialect) for column in columns),
    )


def _reader(kind: TypeEngine[Any], dialect: Dialect) -> Processor:
    """Numbers, texts and bytes come from both drivers as they are; our own types and SQLite's booleans don't."""
    if isinstance(kind, TypeDecorator | Boolean):
        return kind.dialect_impl(dialect).result_processor(dialect, None)
    return None
