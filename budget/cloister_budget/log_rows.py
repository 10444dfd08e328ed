"""The rows that an append moves: the log's last leaf and its head. One statement looks at where it ends and goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Executable, Update, bindparam, func, insert, literal_column, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cloister_budget.statements import Statement
from cloister_budget.tables import Leaf, LogHead


@dataclass(frozen=True, slots=True)
class End:
    """Where the stored log ends: its size, the signature in its head, the hashes in its last row (None: no row)."""

    size: int
    signature: bytes
    last: bytes | None


_ONE: Any = literal_column("1")
_LAST_ROW = select(Leaf.index, Leaf.hashes).where(Leaf.index == select(func.max(Leaf.index)).scalar_subquery())
_LOCK = Statement(lambda _: select(LogHead.size, LogHead.signature).where(LogHead.id == _ONE).with_for_update())
_LAST = Statement(lambda _: _LAST_ROW)
_ADD_LEAF = Statement(lambda _: insert(Leaf.__table__))  # type: ignore[arg-type]


def _first(dialect: str) -> Executable:
    new: Any = (sqlite if dialect == "sqlite" else postgresql).insert(LogHead)
    return new.on_conflict_do_nothing(index_elements=["id"])  # type: ignore[no-any-return]


_FIRST = Statement(_first)


def _moved() -> Update:
    last = _LAST_ROW.with_only_columns(Leaf.hashes).scalar_subquery()
    return (
        update(LogHead)
        .where(
            LogHead.id == _ONE,
            # Where another transaction is waited for, PostgreSQL compares the head with these anew, and the leaf not.
            LogHead.size == bindparam("old_size"),
            LogHead.signature == bindparam("old_signature"),
            last.is_not_distinct_from(bindparam("old_last")),
        )
        .values(size=bindparam("new_size"), signature=bindparam("new_signature"))
    )


def _extended(_: str) -> Executable:
    moved = _moved().returning(LogHead.id).cte("moved")
    columns = Leaf.__table__.columns
    leaf = select(*(bindparam(column.name, type_=column.type) for column in columns)).select_from(moved)
    return insert(Leaf).from_select(list(columns), leaf)


_MOVE = Statement(lambda _: _moved())
_EXTEND = Statement(_extended)


def lock(s: Session) -> End | None:
    """Where the log ends, which is this transaction's alone from here on. None: its head isn't its last leaf's."""
    found = _LOCK.run(s)
    if not found:
        _FIRST.run(s, {"id": 1, "size": 0, "signature": b""})
        found = _LOCK.run(s)
    size, signature = found[0]
    index, last = next(iter(_LAST.run(s)), (-1, None))
    return End(size, signature, last) if size == index + 1 else None


def extend(s: Session, old: End, new: End, leaf: Mapping[str, Any]) -> bool:
    """Add a leaf's row and move the head. False where the log doesn't end at `old`: nothing was written then.

    It is this transaction's alone from here on; another one that extends it is waited for.
    """
    values = {
        "old_size": old.size, "old_signature": old.signature, "old_last": old.last,
        "new_size": new.size, "new_signature": new.signature, **leaf,
    }  # fmt: skip
    connection = s.connection()
    if connection.dialect.name == "postgresql":
        return _EXTEND.change(connection, values) == 1
    if _MOVE.change(connection, values) != 1:
        return False
    _ADD_LEAF.run(connection, leaf)
    return True
