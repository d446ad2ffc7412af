"""Checks of what the application says: settings, tasks, the broker's settings beside them."""

from __future__ import annotations

from collections.abc import Iterator

from celery_batchtrack.surfaces.render import duration

from .facts import Facts, Finding, TaskFacts, fail, ok, some, warn

#: RabbitMQ's own default for `consumer_timeout`, seconds.
_CONSUMER_TIMEOUT = 1800.0
#: So many messages before the detector's are no queue to speak of.
_FEW = 100


def configuration(facts: Facts) -> Iterator[Finding]:
    """Settings that are no settings, or have values that are none."""
    if facts.configuration_error is not None:
        yield fail("configuration", facts.configuration_error, "nothing is tracked until this is mended")
    for spelling, counts in facts.ignored_settings.items():
        yield warn("configuration", f"{spelling} is ignored", f"write it as {counts}")
    if facts.settings is not None and not facts.settings.enabled:
        yield warn(
            "configuration", f"{facts.spelt('enabled')} is off: new chords go through Celery's own, untracked",
            "switch it on again when you are done with what it was for",
        )  # fmt: skip
    elif facts.settings is not None and not facts.ignored_settings:
        yield ok("configuration", "every setting is known and has a value that fits")


def tasks(facts: Facts) -> Iterator[Finding]:
    """Tasks without our wrapper, here; workers tell of theirs themselves."""
    if facts.tasks_error is not None:
        yield fail(
            "tasks", f"the application's tasks cannot be imported: {facts.tasks_error}",
            "mend the import: commands that send (retry, cancel, detect) need all tasks, as a worker does",
        )  # fmt: skip
        return
    bare = [each.name for each in facts.tasks if not each.wrapped]
    if bare:
        yield fail(
            "tasks", f"not wrapped, so that their children run unseen: {some(bare)}",
            "call BatchTrack(app) on the app that they are registered with, and register them through @app.task or "
            "app.register_task()",
        )  # fmt: skip
    else:
        yield ok("tasks", f"all {len(facts.tasks)} tasks have the wrapper")


def apply_async(facts: Facts) -> Iterator[Finding]:
    """Tasks that send themselves, such as celery-once's."""
    for each in facts.tasks:
        if each.own_apply_async:
            yield warn(
                "apply_async", f"{each.name} overrides apply_async ({each.own_apply_async}): sent one by one",
                "what it refuses to send is a failed child (not_sent): see the neighbours' page of the documentation",
            )  # fmt: skip


def poison(facts: Facts) -> Iterator[Finding]:
    """What kills its worker and is delivered again for ever."""
    uncapped = [each.name for each in facts.tasks if _uncapped(each)]
    if uncapped:
        yield warn(
            "redelivery",
            f"acks_late and reject_on_worker_lost without a cap: {some(uncapped)}. Sent outside a batch, one that "
            "kills its process is delivered again without end",
            "send them in batches, where max_crashes ends it (@tracked says that you do), or take "
            f"{facts.spelt_celery('task_reject_on_worker_lost')} off them",
        )  # fmt: skip


def _uncapped(each: TaskFacts) -> bool:
    return each.acks_late and each.reject_on_worker_lost and not each.tracked


def broker(facts: Facts) -> Iterator[Finding]:
    """Does it answer, and can it say how long a queue is?"""
    found = facts.broker
    if found is None:
        return
    if found.error is not None:
        yield fail(
            "broker", f"{found.url} does not answer: {found.error}",
            "check that it runs, and broker_url. Batches that are made meanwhile are sent when it is back",
        )  # fmt: skip
        return
    unknown = [name for name, length in found.queues.items() if length is None]
    if unknown:
        yield warn(
            "broker", f"{found.transport} does not tell how long its queues are ({some(unknown)}): a child whose "
            f"message was lost is sent again only after {facts.spelt('redispatch_wait')}",
            f"lower {facts.spelt('redispatch_wait')} if that is too long; a message too many does no harm",
        )  # fmt: skip
    else:
        yield ok("broker", f"{found.transport} at {found.url}")


def visibility(facts: Facts) -> Iterator[Finding]:
    """A message that is not acknowledged in time is given to another worker."""
    found = facts.broker
    if found is None or found.visibility_timeout is None:
        return
    timeout, name = found.visibility_timeout, f"{found.transport} visibility_timeout"
    advice = (
        f"set {facts.spelt_celery('broker_transport_options')} = {{'visibility_timeout': …}} above it, the same in "
        "workers and clients"
    )
    bad = False
    for each, limit in _limits(facts):
        if limit > timeout:
            bad = True
            yield fail(
                "visibility", f"{name} {timeout:g} s < time_limit {limit:g} s of {each}: its message comes again while "
                "it runs, and outside a batch it runs twice", advice,
            )  # fmt: skip
    longest, whose = _longest_countdown(facts)
    if longest > timeout:
        bad = True
        yield fail(
            "visibility", f"{name} {timeout:g} s < countdown {duration(longest)} of {whose}: its message is delivered "
            "again and again while it waits", advice,
        )  # fmt: skip
    if not bad:
        yield ok("visibility", f"{name} {timeout:g} s is longer than every time limit and countdown that is known")


def _limits(facts: Facts) -> Iterator[tuple[str, float]]:
    """(task, seconds) of tasks under `acks_late`, the longest first; a worker's own limit is that of all of them."""
    late = [each for each in facts.tasks if each.acks_late]
    of_tasks = [(each.name, each.time_limit) for each in late if each.time_limit]
    of_workers = [
        (f"tasks on {each.name}", float(each.told["time_limit"]))
        for each in facts.replies or () if late and each.told.get("time_limit")
    ]  # fmt: skip
    yield from sorted([*of_tasks, *of_workers], key=lambda each: -each[1])[:5]


def _longest_countdown(facts: Facts) -> tuple[float, str]:
    tables = facts.tables
    waiting = (tables.longest_wait if tables is not None else 0.0, "a child that waits now")
    retries = ((each.retry_delay, f"{each.name} (default_retry_delay)") for each in facts.tasks)
    return max([waiting, *retries], key=lambda each: each[0])


def consumer_timeout(facts: Facts) -> Iterator[Finding]:
    """RabbitMQ closes the channel of who does not acknowledge in time."""
    if facts.broker is None or facts.broker.transport not in ("amqp", "pyamqp", "amqps"):
        return
    for each, limit in _limits(facts):
        if limit > _CONSUMER_TIMEOUT:
            yield warn(
                "visibility", f"time_limit {limit:g} s of {each} is longer than RabbitMQ's consumer_timeout by default "
                f"({_CONSUMER_TIMEOUT:g} s): its channel is closed, and the message delivered again",
                "raise consumer_timeout in rabbitmq.conf above it, if you have not",
            )  # fmt: skip


def detector_queue(facts: Facts) -> Iterator[Finding]:
    """The detector's own message behind the work that it watches."""
    queue, found = facts.detector_queue, facts.broker
    if queue is None or found is None or found.error is not None:
        return
    shared = any(each.queue == queue for each in facts.tasks)
    length = found.queues.get(queue) or 0
    if shared and length > _FEW:
        yield warn(
            "detector", f"its messages wait in {queue}, which is the work's too, behind {length} others: only sweeps "
            "that workers make by themselves come in time",
            f"give it a queue of its own ({facts.spelt('detect_queue')} = 'ops') and a worker for that",
        )  # fmt: skip
    else:
        says = "the work's too; workers sweep by themselves when it is late" if shared else "its own"
        yield ok("detector", f"its queue is {queue}, {says}")


CHECKS = (configuration, tasks, apply_async, poison, broker, visibility, consumer_timeout, detector_queue)
