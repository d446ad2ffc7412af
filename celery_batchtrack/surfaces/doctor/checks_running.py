"""Checks of what runs: the detector, the workers, clocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from celery_batchtrack.surfaces.render import duration
from celery_batchtrack.vocabulary.crash_policy import base_queue

from .facts import Facts, Finding, Reply, fail, ok, some, warn

#: Seconds of skew that nobody minds, and those by which what expires or is due later goes wrong.
_SKEW, _BAD_SKEW = 2.0, 15.0
#: Settings that mean something only if all processes have the same.
_THE_SAME = (
    "enabled", "lease", "heartbeat", "lease_shared_gil", "detect_every", "redispatch_after", "redispatch_wait",
    "max_in_flight", "max_queue_depth", "max_crashes", "retention", "app_version", "owners",
)  # fmt: skip
#: Pools whose children share a process: how workers call them (by the module that it is from), and how `-P` does.
_SHARED = {"solo": "solo", "thread": "threads", "gevent": "gevent", "eventlet": "eventlet"}


# -- the detector -------------------------------------------------------------------------------------


def sweeps(facts: Facts) -> Iterator[Finding]:
    """Does anybody look for the dead?"""
    tables = facts.tables
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
    tables = facts.tables
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
    seen = {(each.name, each.pool) for each in (facts.tables.workers if facts.tables else ())}
    seen |= {(each.name, str(each.told.get("pool"))) for each in facts.replies or ()}
    for pool, option in _SHARED.items():
        names = sorted(name for name, its_pool in seen if its_pool == pool)
        if names:
            lease = facts.settings.lease_shared_gil if facts.settings else 60.0
            yield warn(
                "pool", f"-P {option} on {some(names)}: a crash takes the whole worker along, and is seen when another "
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


def waiting(facts: Facts) -> Iterator[Finding]:
    """What was sent to a queue that nobody consumes. A worker that does not tell of its queues may be who does."""
    telling = _telling(facts)
    all_told = len(telling) == len(facts.replies or ()) and _registered(facts) <= telling
    level, who = (fail, "no worker consumes") if all_told else (warn, "no worker that tells of its queues consumes")
    for queue, number in sorted(_unconsumed(facts).items()):
        what = "1 child waits" if number == 1 else f"{number} children wait"
        yield level(
            "queues", f"{what} in {queue}, which {who}",
            f"start one for it: celery -A <app> worker -Q {base_queue(queue)}",
        )  # fmt: skip


def queues(facts: Facts) -> Iterator[Finding]:
    """Queues in which messages would wait for ever. Only those who answer are known to listen."""
    consumed, already = _consumed(facts), _unconsumed(facts)
    if not consumed or _registered(facts) - _telling(facts):
        return
    by_queue: dict[str, list[str]] = {}
    for task in facts.tasks:
        if task.queue is not None and task.queue not in consumed and task.queue not in already:
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
    if not by_queue and not already and facts.detector_queue in consumed:
        yield ok("queues", f"every queue that tasks go to is consumed: {some(sorted(consumed))}")


def _registered(facts: Facts) -> set[str]:
    return {row.name for row in (facts.tables.workers if facts.tables else ()) if row.kind == "worker"}


def _telling(facts: Facts) -> set[str]:
    """Workers that say what they consume."""
    return {each.name for each in facts.replies or () if each.told.get("queues")}


def _consumed(facts: Facts) -> set[str]:
    return {queue for each in facts.replies or () for queue in each.told.get("queues") or ()}


def _unconsumed(facts: Facts) -> dict[str, int]:
    """Children by queue, where no worker is known to take them. Suspects' queues belong to those that they are from:
    their workers consume them as soon as something is in them. Without any answer nothing is known."""
    consumed, sent = _consumed(facts), facts.tables.sent if facts.tables is not None else {}
    return {queue: number for queue, number in sent.items() if consumed and not {queue, base_queue(queue)} & consumed}


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
    sweeps, beat, workers, pools, stores, waiting, queues, unwrapped, agreement, black_boxes, clocks,
)  # fmt: skip
