"""The version of the database, and the way from older ones to this."""

import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Connection, Engine, MetaData, inspect

VERSION = 3  # in `PRAGMA user_version`; databases of version 1 hold 0 there


def bring_up_to_date(engine: Engine, metadata: MetaData, path: Path) -> None:
    """Creates the tables, or changes those of an older version; all of it or nothing.

    Raises:
        RuntimeError: the database is of a newer version, or its tables are of none.
    """
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        if version > VERSION:
            raise RuntimeError(
                f"{path} is of version {version}, and this version of the pack reads up to {VERSION}; update "
                "the pack, or move the file away to begin anew"
            )
        is_new = not inspect(connection).get_table_names()
        metadata.create_all(connection)
        for earlier in () if is_new else range(max(version, 1), VERSION):
            _STEPS[earlier](connection)
        _check_columns(connection, metadata, path)
        connection.exec_driver_sql(f"PRAGMA user_version = {VERSION}")
        connection.commit()


def _check_columns(connection: Connection, metadata: MetaData, path: Path) -> None:
    for name, table in metadata.tables.items():
        there = {column["name"] for column in inspect(connection).get_columns(name)}
        if lacking := {column.name for column in table.columns} - there:
            raise RuntimeError(
                f"the table {name} in {path} has no {', '.join(sorted(lacking))}; move the file "
                "away to begin anew"
            )


def _let_inputs_expire(connection: Connection) -> None:
    """From 1 to 2: pictures of tasks that are over go after an hour; they had stayed for ever."""
    connection.exec_driver_sql(
        "UPDATE files SET expires_at = ? WHERE role = 'input' AND expires_at IS NULL AND task_id NOT IN "
        "(SELECT id FROM tasks WHERE status NOT IN (10, 11, 12))",
        (time.time() + 3600,),
    )


def _add_what_a_fleet_needs(connection: Connection) -> None:
    """From 2 to 3: which stations may run a task, and how often one was given it."""
    connection.exec_driver_sql("ALTER TABLE tasks ADD COLUMN placement JSON")
    connection.exec_driver_sql("ALTER TABLE tasks ADD COLUMN tries INTEGER NOT NULL DEFAULT 0")


_STEPS: dict[int, Callable[[Connection], None]] = {1: _let_inputs_expire, 2: _add_what_a_fleet_needs}
