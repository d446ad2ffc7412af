"""Checks of the tracking database: does it answer, fit, suffice, and is it one?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from celery_batchtrack.surfaces.render import duration
from celery_batchtrack.vocabulary.checkup import Tables
from celery_batchtrack.vocabulary.records import WorkerRow

from .facts import Facts, Finding, fail, ok, some, warn

#: Connections of a worker's main process, and of a client, beside one per pool process.
_OF_MAIN, _OF_CLIENT = 2, 2
_NEARLY_ALL = 0.8


def database(facts: Facts) -> Iterator[Finding]:
    """Does it answer?"""
    if facts.database_error is not None:
        yield fail("database", facts.database_error, "children wait until it is back; tasks outside batches go on")
    elif facts.database is not None:
        yield ok("database", f"{facts.database.product} at {facts.database.url}")


def schema(facts: Facts) -> Iterator[Finding]:
    """Do its tables fit this version of the package?"""
    found = facts.database
    if found is None:
        return
    if found.schema == "CURRENT":
        yield ok("schema", f"{found.revision} = code {found.wanted_revision}")
        return
    if found.schema == "EMPTY" and found.makes_tables:
        yield ok("schema", "no tables yet: they are made at first use")
        return
    told = f"the database {found.schema_says} (schema {found.revision or 'none'}, code {found.wanted_revision})"
    advice = "upgrade the package on this machine"
    if found.schema != "NEWER":
        advice = "run `celery -A <app> batchtrack migrate` (in a Django project, `manage.py migrate`)"
    yield fail("schema", told, advice)


def connections(facts: Facts) -> Iterator[Finding]:
    """Are there enough for every process?"""
    found, tables = facts.database, facts.tables
    if found is None or tables is None or found.connections is None:
        return
    if found.connections.pooler is not None:
        yield ok("connections", "through a pooler, whose own limits count: they cannot be seen from here")
        return
    needed, silent = _needed(facts, tables)
    free = found.connections.allowed - found.connections.by_others
    told = f"{needed} connections needed of {free}" + (f" ({found.connections.by_others} more are others')" * (
        found.connections.by_others > 0
    )) + (f"; of {silent} workers that did not answer one process is counted" if silent else "")  # fmt: skip
    advice = "raise PostgreSQL's max_connections, put a pooler between, or start fewer processes"
    if needed > free:
        yield fail("connections", told, advice)
    elif needed > _NEARLY_ALL * free:
        yield warn("connections", told, advice)
    else:
        yield ok("connections", told)


def _needed(facts: Facts, tables: Tables) -> tuple[int, int]:
    """Connections when all are busy, and of how many workers it is not known how many processes they have."""
    processes = {each.told.get("worker_id"): int(each.told.get("processes") or 1) for each in facts.replies or ()}
    needed = silent = 0
    for each in tables.workers:
        if each.kind == "client":
            needed += _OF_CLIENT
            continue
        silent += str(each.id) not in processes
        needed += processes.get(str(each.id), 1) + _OF_MAIN
    return needed, silent


def pooler(facts: Facts) -> Iterator[Finding]:
    """PgBouncer gives each transaction another connection: what was prepared on one is missing on the next."""
    found = facts.database.connections if facts.database is not None else None
    if found is None or found.pooler is None:
        return
    if found.pooler == "transaction" and found.prepares:
        yield fail(
            "pooler", "a pooler in transaction mode is between, and the driver prepares statements: they are missing "
            "on the next connection, unless the pooler keeps them (PgBouncer 1.21, max_prepared_statements)",
            f"set {facts.spelt('engine_options')} = {{'connect_args': {{'prepare_threshold': None}}}}",
        )  # fmt: skip
    elif found.prepares:
        yield warn(
            "pooler", "a pooler is between; if it is in transaction mode, statements that the driver prepares are lost",
            f"set {facts.spelt('engine_options')} = {{'connect_args': {{'prepare_threshold': None}}}} to be safe",
        )  # fmt: skip
    else:
        yield ok("pooler", "one is between, and the driver prepares no statements")


def one_file(facts: Facts) -> Iterator[Finding]:
    """SQLite is a file of one machine."""
    found, tables = facts.database, facts.tables
    if found is None or not found.sqlite:
        return
    rows: Sequence[WorkerRow] = tables.workers if tables is not None else ()
    machines = {each.boot_id or each.hostname: each.hostname for each in rows}
    for each in facts.replies or ():
        if each.told.get("hostname"):
            machines[each.told.get("boot_id") or each.told["hostname"]] = each.told["hostname"]
    if len(machines) > 1:
        yield fail(
            "database", f"SQLite, but workers run on several machines: {some(sorted(machines.values()))}. Each has a "
            "file of its own, or they share one over a network, which breaks its locks",
            f"use PostgreSQL: {facts.spelt('database_url')} = 'postgresql+psycopg://user@host/name'",
        )  # fmt: skip


def retention(facts: Facts) -> Iterator[Finding]:
    """Is what is over deleted?"""
    tables = facts.tables
    if tables is None:
        return
    if tables.kept_too_long:
        yield warn(
            "retention", f"{tables.kept_too_long} batches are kept longer than {facts.spelt('retention')} says; the "
            f"oldest ended {duration(tables.oldest_seconds)} ago: nobody prunes",
            "workers do it once an hour, as does beat; else run `celery -A <app> batchtrack prune` from cron. A batch "
            "whose callback is open is never pruned",
        )  # fmt: skip
    else:
        yield ok("retention", "nothing is kept for too long")


CHECKS = (database, schema, connections, pooler, one_file, retention)
