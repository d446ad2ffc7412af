"""What people may do from a page or the API: through behaviour, as the commands do."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from celery_batchtrack import errors
from celery_batchtrack.behaviour import finish
from celery_batchtrack.glue.batch import Batch
from celery_batchtrack.glue.extension import BatchTrack
from celery_batchtrack.surfaces import views
from celery_batchtrack.surfaces.render import clean, number
from celery_batchtrack.vocabulary.states import NOT_COMPLETED

logger = logging.getLogger("celery_batchtrack")

#: What may be said of an action on a batch.
OPTIONS = ("only", "queue", "callbacks", "terminate")


@dataclass(frozen=True, slots=True)
class Done:
    """What an action did, for people and for programs. `changed`: it did something."""

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)
    changed: bool = True


def retry(extension: BatchTrack, batch_id: uuid.UUID, options: Mapping[str, str]) -> Done:
    """Run what did not complete again. Options: `only` (comma-separated), `queue`, `callbacks` (1)."""
    batch = Batch._handle(extension, batch_id)
    only = tuple(each for each in options.get("only", "").split(",") if each)
    if set(only) - {str(each) for each in NOT_COMPLETED}:
        raise errors.InvalidOption(f"only is some of failed, crashed, cancelled, not {options['only'][:80]!r}")
    callbacks, queue = options.get("callbacks") == "1", options.get("queue") or None
    if callbacks and (only or queue):
        raise errors.InvalidOption("callbacks goes alone: only and queue are for children")
    if callbacks:
        count = batch.retry_callbacks()
    else:
        count = batch.retry(only or None, overrides={"queue": queue} if queue else None)
    found = extension.store.progress(batch_id)
    what = "callbacks" if callbacks else "children"
    one = {"callbacks": "callback", "children": "child"}[what] if count == 1 else what
    text = (
        f"{number(count)} {one} {'runs' if count == 1 else 'run'} again, in round {found.round}." if count
        else f"No {what} to run again: the batch stays {found.status}."
    )  # fmt: skip
    return Done(text, {"id": batch_id, "status": found.status, "round": found.round, "retried": count}, bool(count))


def cancel(extension: BatchTrack, batch_id: uuid.UUID, options: Mapping[str, str]) -> Done:
    """End a batch now. Option: `terminate` (0: what runs may end by itself)."""
    extension.store.progress(batch_id)  # raises BatchNotFound
    done = finish.cancel(extension.tracker, batch_id, terminate=options.get("terminate", "1") != "0")
    found = extension.store.progress(batch_id)
    text = (
        f"Cancelled: {number(found.cancelled)} children will not run, {number(found.completed)} had completed." if done
        else f"It had ended already: {found.status}."
    )  # fmt: skip
    data = {"id": batch_id, "status": found.status, "cancelled": done is not None, "children": found.cancelled}
    return Done(text, data, done is not None)


def pause(extension: BatchTrack, batch_id: uuid.UUID, options: Mapping[str, str]) -> Done:
    done = finish.pause(extension.tracker, batch_id)
    return _paused(extension, batch_id, "paused", done, "Paused: what runs goes on, nothing more starts.")


def resume(extension: BatchTrack, batch_id: uuid.UUID, options: Mapping[str, str]) -> Done:
    done = finish.resume(extension.tracker, batch_id)
    return _paused(extension, batch_id, "resumed", done, "Resumed: children start again.")


def _paused(extension: BatchTrack, batch_id: uuid.UUID, what: str, done: bool, text: str) -> Done:
    found = next(views.batches(extension.store, [batch_id]), None)
    if found is None:
        raise errors.BatchNotFound(f"no batch {batch_id} in {extension.store.shown_url}")
    data = {name: found[name] for name in ("id", "status", "paused_at", "pause_reason")}
    state = found["status"] if found["finished_at"] else "paused" if found["paused_at"] else found["status"]
    return Done(text if done else f"Nothing to do: the batch is {state}.", {**data, what: done}, done)


def release(extension: BatchTrack, options: Mapping[str, str]) -> Done:
    """Let an item that is in quarantine be sent again. Options: `item` (or its hash), `task`."""
    item, task = options.get("item", ""), options.get("task") or None
    if not item:
        raise errors.InvalidOption("name the item to release: item=…")
    released = extension.store.release_from_quarantine(items=(item,), task=task)
    named = clean(item)[:120]
    text = f"Released {named}: it is sent again." if released else f"{named} is not in quarantine."
    data = {"released": [views.quarantined_item(row, extension.settings.app_version or "") for row in released]}
    return Done(text, data, bool(released))


Action = Callable[[BatchTrack, uuid.UUID, Mapping[str, str]], Done]
ON_BATCH: dict[str, Action] = {"retry": retry, "cancel": cancel, "pause": pause, "resume": resume}


def on_batch(
    extension: BatchTrack, name: str, batch_id: uuid.UUID, options: Mapping[str, str], who: str
) -> Done:
    """Do it, and log who did."""
    done = ON_BATCH[name](extension, batch_id, options)
    logger.info("action=flower_action %s of batch %s by %s: %s", name, batch_id, clean(who), done.text)
    return done


def release_item(extension: BatchTrack, options: Mapping[str, str], who: str) -> Done:
    done = release(extension, options)
    logger.info("action=flower_action release by %s: %s", clean(who), done.text)
    return done
