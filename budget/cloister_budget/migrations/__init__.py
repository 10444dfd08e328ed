"""The database's versions, in order. Alembic runs them inside one transaction when the database is opened."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from cloister_data.errors import ConfigurationError

MIGRATION_LOCK = 0x436C6F69_01
"""Key of the PostgreSQL advisory lock under which the schema is changed."""


def script_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def upgrade(engine: Engine) -> None:
    """Bring the database to the newest version that this package knows.

    Raises ConfigurationError where the database is of a newer version, or holds tables that aren't Cloister's.
    """
    config = script_config()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.begin() as connection:
        _lock_schema(connection)
        found = set(MigrationContext.configure(connection).get_current_heads())
        if found - known:
            raise ConfigurationError(
                "The database was made by a newer version of Cloister.",
                why=f"It is at revision {', '.join(sorted(found - known))}, which this version doesn't know.",
                next_step="Start the newer version, or restore the backup that was made before the upgrade.",
            )
        if not found and _stored_tables(connection) - {"alembic_version"}:
            raise ConfigurationError(
                "The database holds tables that aren't Cloister's.", next_step="Name an empty database."
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _stored_tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


def _lock_schema(connection: Connection) -> None:
    """Let one process at a time change the schema; SQLite's BEGIN IMMEDIATE did that already."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
