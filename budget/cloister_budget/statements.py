"""The few statements that every charge needs, compiled once. Everything else goes through the ORM.

Building, caching and binding a statement anew costs several times what the database takes to run one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Boolean, Connection, Dialect
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeDecorator, TypeEngine

Processor = Callable[[Any], Any] | None


@dataclass(frozen=True)
class _Compiled:
    """SQL as the driver takes it. `binding` are the parameters by name, in their order where the driver counts them."""

    sql: str
    positional: bool
    binding: tuple[tuple[str, Processor], ...]
    reading: tuple[Processor, ...]

    def parameters(self, values: Mapping[str, Any]) -> Any:
        if self.positional:
            return tuple([values[name] if bind is None else bind(values[name]) for name, bind in self.binding])
        return {name: values[name] if bind is None else bind(values[name]) for name, bind in self.binding}


class Statement:
    """One Core statement. `build` makes it, given the dialect's name, at its first use on each.

    Its parameters are all `bindparam`s (or an insert's columns), and none is expanding. It runs on a connection, or in
    a session's transaction.
    """

    def __init__(self, build: Callable[[str], Any]) -> None:
        self._build = build
        self._compiled: dict[str, _Compiled] = {}

    def run(self, on: Session | Connection, values: Mapping[str, Any] | None = None) -> Sequence[tuple[Any, ...]]:
        """Execute it; answers its rows. Every parameter needs a value."""
        connection = _connection(on)
        compiled = self._for(connection.dialect)
        found = connection.exec_driver_sql(compiled.sql, compiled.parameters(values or {}))
        if not found.returns_rows:
            return ()
        return [
            tuple(value if read is None else read(value) for value, read in zip(row, compiled.reading, strict=True))
            for row in found.all()
        ]

    def change(self, on: Session | Connection, values: Mapping[str, Any]) -> int:
        """Execute it; answers how many rows it changed."""
        connection = _connection(on)
        compiled = self._for(connection.dialect)
        return connection.exec_driver_sql(compiled.sql, compiled.parameters(values)).rowcount

    def run_many(self, on: Session | Connection, values: Sequence[Mapping[str, Any]]) -> None:
        """Execute it once for each mapping."""
        connection = _connection(on)
        compiled = self._for(connection.dialect)
        connection.exec_driver_sql(compiled.sql, [compiled.parameters(each) for each in values])

    def _for(self, dialect: Dialect) -> _Compiled:
        found = self._compiled.get(dialect.name)
        if found is None:
            found = self._compiled[dialect.name] = _compile(self._build(dialect.name), dialect)
        return found


def _connection(on: Session | Connection) -> Connection:
    return on if isinstance(on, Connection) else on.connection()


def _compile(built: Any, dialect: Dialect) -> _Compiled:
    compiled = built.compile(dialect=dialect)
    names = tuple(compiled.positiontup if compiled.positional else compiled.binds)
    columns = built.selected_columns if built.is_select else getattr(built, "exported_columns", ())
    return _Compiled(
        str(compiled),
        bool(compiled.positional),
        tuple((name, _processor(compiled.binds[name].type, dialect, reads=False)) for name in names),
        tuple(_processor(column.type, dialect, reads=True) for column in columns),
    )


def _processor(kind: TypeEngine[Any], dialect: Dialect, *, reads: bool) -> Processor:
    """Numbers, texts and bytes go to both drivers and come as they are; our own types and SQLite's booleans don't."""
    if not isinstance(kind, TypeDecorator | Boolean):
        return None
    own = kind.dialect_impl(dialect)
    return own.result_processor(dialect, None) if reads else own.bind_processor(dialect)
