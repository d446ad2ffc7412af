"""Checks of what runs: the database, the workers, the detector, clocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from celery_batchtrack.surfaces.render import duration
from celery_batchtrack.vocabulary.checkup import DatabaseFacts, Tables
from celery_batchtrack.vocabulary.records import WorkerRow

from .facts import Facts, Finding, Reply, fail, ok, some, warn

#: Seconds of skew that nobody minds, and those by which what expires or is due later goes wrong.
_SKEW, _BAD_SKEW = 2.0, 15.0
#: Connections of a worker's main process, and of a client, beside one per pool process.
_OF_MAIN, _OF_CLIENT = 2, 2
_NEARLY_ALL = 0.8
#: Settings that mean something only if all processes have the same.
_THE_SAME = (
    "enabled", "lease", "heartbeat", "lease_shared_gil", "detect_every", "redispatch_after", "redispatch_wait",
    "max_in_flight", "max_queue_depth", "max_crashes", "retention", "app_version", "owners",
)  # fmt: skip


# -- the database -------------------------------------------------------------------------------------


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
    if found.schema == "EMPTY" and _makes_tables(facts, found):
        yield ok("schema", "no tables yet: they are made at first use")
        return
    told = f"the database {found.schema_says} (schema {found.revision or 'none'}, code {found.wanted_revision})"
    advice = "upgrade the package on this machine"
    if found.schema != "NEWER":
        advice = "run `celery -A <app> batchtrack migrate` (in a Django project, `manage.py migrate`)"
    yield fail("schema", told, advice)


def _makes_tables(facts: Facts, found: DatabaseFacts) -> bool:
    wanted = facts.settings.auto_migrate if facts.settings is not None else None
    return found.sqlite if wanted is None else wanted


def connections(facts: Facts) -> Iterator[Finding]:
    """Are there enough for every process?"""
    found, tables = _connected(facts)
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


def _connected(facts: Facts) -> tuple[DatabaseFacts | None, Tables | None]:
    return facts.database, facts.database.tables if facts.database is not None else None


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
    found, tables = _connected(facts)
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
    _, tables = _connected(facts)
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


# -- the detector -------------------------------------------------------------------------------------


def sweeps(facts: Facts) -> Iterator[Finding]:
    """Does anybody look for the dead?"""
    _, tables = _connected(facts)
    if tables is None or facts.settings is None:
        return
    every = facts.settings.detect_every
    late = tables.swept_seconds is None or tables.swept_seconds > 2 * every + 10
    if not late:
        yield ok("sweeps", f"the last {duration(tables.swept_seconds)} ago, by {tables.swept_by}")
        return
    when = "nobody has ever swept" if tables.swept_seconds is None else (
        f"nobody has swept for {duration(tables.swept_seconds)} (the last was {tables.swept_by})"
    )  # fmt: skip
    advice = (
        "start a worker of this app, which sweeps by itself, or `celery -A <app> batchtrack detect --every "
        f"{every:g}s`; beat alone needs a worker, too"
    )
    if tables.open_batches:
        yield fail("sweeps", f"{when}, and {tables.open_batches} batches are open: crashes stay unseen", advice)
    else:
        yield warn("sweeps", when, advice)


def beat(facts: Facts) -> Iterator[Finding]:
    """Has somebody switched the detector off?"""
    if facts.beat_disabled:
        yield warn(
            "beat", "the periodic task 'batchtrack-detect-crashes' is disabled in django-celery-beat",
            "workers sweep when a sweep is overdue; enable it in the admin to have beat do it",
        )  # fmt: skip


# -- workers --------------------------------------------------------------------------------------------


def workers(facts: Facts) -> Iterator[Finding]:
    """Who works, and who of them answers."""
    _, tables = _connected(facts)
    if tables is None:
        return
    names = sorted(each.name for each in tables.workers if each.kind == "worker")
    if not names:
        level = fail if tables.open_batches else warn
        yield level("workers", "none is registered in this database", "start one: celery -A <app> worker")
        return
    answered = {each.name for each in facts.replies or ()}
    silent = [each for each in names if each not in answered]
    if facts.broker is None or facts.broker.error is not None:
        yield ok("workers", f"{len(names)} alive: {some(names)}; not asked, for the broker does not answer")
    elif facts.replies is None or not facts.broker.remote_control:
        yield ok("workers", f"{len(names)} alive: {some(names)}; not asked, for there is no remote control")
    elif silent:
        yield warn(
            "workers", f"{len(names)} alive, but no answer from {some(silent)}",
            "busy with one task (solo), worker_enable_remote_control is off, or it uses another broker",
        )  # fmt: skip
    else:
        yield ok("workers", f"{len(names)} alive, and all answer: {some(names)}")


def pools(facts: Facts) -> Iterator[Finding]:
    """Pools in which a crash takes along more than its child."""
    _, tables = _connected(facts)
    for pool in ("solo", "threads", "gevent", "eventlet"):
        names = [each.name for each in (tables.workers if tables else ()) if each.pool == pool]
        if names:
            lease = facts.settings.lease_shared_gil if facts.settings else 60.0
            yield warn(
                "pool", f"-P {pool} on {some(names)}: a crash takes the whole worker along, and is seen when another "
                f"starts on its host, or after {duration(2 * lease)}",
                "use -P prefork where a child may crash",
            )  # fmt: skip


def stores(facts: Facts) -> Iterator[Finding]:
    """Workers that take messages but look into another database."""
    for each in facts.replies or ():
        if each.error is not None or each.told.get("installed") is False:
            yield fail(
                "store", f"worker {each.name} has no BatchTrack(app), or an old one: it runs children unseen",
                "deploy BatchTrack(app) there before batches are made",
            )  # fmt: skip
        elif each.told.get("trouble"):
            yield fail("store", f"worker {each.name}: {each.told['trouble']}")
        elif facts.store_id and each.told.get("store_id") not in (None, facts.store_id):
            yield fail(
                "store", f"worker {each.name} uses another batchtrack database ({each.told.get('database')}, store "
                f"{str(each.told['store_id'])[:8]} ≠ {facts.store_id[:8]})",
                f"give it the same {facts.spelt('database_url')}",
            )  # fmt: skip
        elif each.told.get("takes_part") is False:
            yield fail(
                "store", f"worker {each.name} does not take part ({facts.spelt('enabled')} is off there, without a "
                "database)", f"set {facts.spelt('database_url')} there",
            )  # fmt: skip
        elif each.told.get("store_id") is None:
            yield fail(
                "store", f"worker {each.name} has not reached its tracking database ({each.told.get('database')}): "
                "children that it takes wait", "its log says why: action=unregistered",
            )  # fmt: skip


def queues(facts: Facts) -> Iterator[Finding]:
    """Queues in which messages would wait for ever. Only those who answer are known to listen."""
    replies = [each for each in facts.replies or () if each.told.get("queues")]
    _, tables = _connected(facts)
    silent = {row.name for row in (tables.workers if tables else ()) if row.kind == "worker"}
    if not replies or silent - {each.name for each in replies}:
        return
    consumed = {queue for each in replies for queue in each.told["queues"]}
    by_queue: dict[str, list[str]] = {}
    for task in facts.tasks:
        if task.queue is not None and task.queue not in consumed:
            by_queue.setdefault(task.queue, []).append(task.name)
    for queue, names in by_queue.items():
        yield warn(
            "queues", f"no worker consumes {queue}, where {some(names)} would wait",
            f"start one for it: celery -A <app> worker -Q {queue}; or mend task_routes",
        )  # fmt: skip
    if facts.detector_queue is not None and facts.detector_queue not in consumed:
        yield warn(
            "queues", f"no worker consumes {facts.detector_queue}, where the detector's messages go: only sweeps that "
            "workers make by themselves are made",
            f"start one for it: celery -A <app> worker -Q {facts.detector_queue}",
        )  # fmt: skip
    if not by_queue and facts.detector_queue in consumed:
        yield ok("queues", f"every queue that tasks go to is consumed: {some(sorted(consumed))}")


def unwrapped(facts: Facts) -> Iterator[Finding]:
    """Tasks without our wrapper, on workers."""
    for each in facts.replies or ():
        bare = list(each.told.get("untracked") or ())
        if bare:
            yield fail(
                "tasks", f"not wrapped on worker {each.name}, so that their children run unseen: {some(bare)}",
                "register them with the app that has the BatchTrack, through @app.task or app.register_task()",
            )  # fmt: skip


def agreement(facts: Facts) -> Iterator[Finding]:
    """Settings and versions that differ between here and the workers."""
    for each in facts.replies or ():
        version = each.told.get("version")
        if version and version != facts.version:
            yield warn(
                "version", f"worker {each.name} runs celery-batchtrack {version}, here is {facts.version}",
                "finish the deployment: migrate first, then workers, beat and clients",
            )  # fmt: skip
        told = each.told.get("settings") or {}
        differ = [name for name in _THE_SAME if name in told and told[name] != facts.own_settings.get(name)]
        for name in differ:
            yield warn(
                "settings", f"{facts.spelt(name)} is {told[name]!r} on worker {each.name}, and "
                f"{facts.own_settings.get(name)!r} here", "give all processes the same",
            )  # fmt: skip


def black_boxes(facts: Facts) -> Iterator[Finding]:
    """Without a folder, a death is known by its row alone, and an outcome cannot be spooled."""
    advice = f"give it a folder that it may write: {facts.spelt('blackbox_dir')}"
    bad = [each for each in facts.replies or () if "blackbox" in each.told and each.told["blackbox"] is None]
    for each in bad:
        yield fail(
            "black box", f"worker {each.name} has no folder to write in ({_why(each)}): crashes are known without item "
            "and stack, and what ends while the database is away is lost with its process", advice,
        )  # fmt: skip
    if facts.settings is None:
        return
    if facts.blackbox is None:
        where = facts.settings.blackbox_dir or "/dev/shm, XDG_RUNTIME_DIR, the temp folder"
        yield warn("black box", f"no folder to write in on this host ({where})", f"{advice}, if workers run here")
    elif not bad:
        yield ok("black box", f"{PurePath(facts.blackbox)} on this host")


def _why(each: Reply) -> str:
    settings = each.told.get("settings") or {}
    return str(each.told.get("blackbox_trouble") or settings.get("blackbox_dir") or "none of the usual places")


def clocks(facts: Facts) -> Iterator[Finding]:
    """Countdowns and expiries are moments that one host writes and another reads."""
    if facts.database is None:
        return
    here = facts.database.ahead
    skews = [(f"this host ({facts.hostname})", here)]
    skews += [(f"worker {each.name}", here + each.ahead) for each in facts.replies or () if each.ahead]
    bad = False
    for who, ahead in skews:
        if abs(ahead) > _SKEW:
            bad = True
            how = "ahead of" if ahead > 0 else "behind"
            level = fail if abs(ahead) > _BAD_SKEW else warn
            yield level(
                "clock", f"{who} is {duration(abs(ahead))} {how} the database's clock: countdowns come too "
                f"{'late' if ahead < 0 else 'early'}, and messages expire too {'late' if ahead < 0 else 'early'}",
                "run an NTP client (chrony, systemd-timesyncd) on every host",
            )  # fmt: skip
    if not bad:
        yield ok("clock", f"all that could be asked are within {_SKEW:g} s of the database's")


CHECKS = (
    database, schema, connections, pooler, one_file, retention, sweeps, beat, workers, pools, stores, queues, unwrapped,
    agreement, black_boxes, clocks,
)  # fmt: skip
