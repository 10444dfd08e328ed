"""Alembic's way in: it runs on the connection, and in the transaction, of `cloister_budget.migrations.upgrade`."""

from __future__ import annotations

from alembic import context

from cloister_budget.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, transactional_ddl=False
)
context.run_migrations()
