"""Celery signals sent after the commit of what they tell. All have ``sender`` = the app.

=======================  =============================================================================================
`batch_started`          ``batch_id``, ``name``, ``round`` (from 1), ``parent_batch`` (of a nested one, else None):
                         all children are there. Once in each round
`batch_finished`         ``batch_id``, ``name``, ``status`` (completed, partial, failed, cancelled), ``reason`` (of a
                         cancelled one, else None). Once in each round. `batch_ended`, its former name, is the same
`batch_retried`          ``batch_id``, ``round``, ``children`` (how many run again)
`batch_paused`           ``batch_id``, ``reason``, ``by_hand`` (False: by its breaker)
`batch_resumed`          ``batch_id``
`child_settled`          ``batch_id``, ``position``, ``task``, ``status`` (completed, failed, crashed, cancelled),
                         ``attempt``: the end of a child, or of a callback. Not sent for the children that go with a
                         batch when it is cancelled
`child_crashed`          ``batch_id``, ``position``, ``task``, ``attempt``, ``evidence`` (signal, item, stack, …: see
                         `vocabulary.evidence.Evidence`), ``runs_again``, ``items``: a death, whatever becomes of it
`verdict_overturned`     ``batch_id``, ``position``, ``status``: a child that `child_crashed` told of reported its end
                         after all; its worker had only been silent
`item_quarantined`       ``batch_id``, ``position``, ``task``, ``item``: it has killed often enough, is sent no more
`worker_lost`            ``worker_id``, ``name``, ``hostname``, ``pid``, ``detected_by``
=======================  =============================================================================================

A receiver runs in the process that wrote: a pool process, a worker's main process, or a client's. What it raises is
logged by Celery, and changes nothing. The process may die between the commit and the signal, or a sweep may finish what
another process began: then a signal is not sent. None is sent twice for one event. Who must not miss anything reads the
tables, or declares a callback.

The start of a child is told by Celery's own ``task_prerun``.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

batch_started = Signal(name="batch_started", providing_args={"batch_id", "name", "round", "parent_batch"})
batch_finished = Signal(name="batch_finished", providing_args={"batch_id", "name", "status", "reason"})
batch_ended = batch_finished
batch_retried = Signal(name="batch_retried", providing_args={"batch_id", "round", "children"})
batch_paused = Signal(name="batch_paused", providing_args={"batch_id", "reason", "by_hand"})
batch_resumed = Signal(name="batch_resumed", providing_args={"batch_id"})
child_settled = Signal(name="child_settled", providing_args={"batch_id", "position", "task", "status", "attempt"})
child_crashed = Signal(
    name="child_crashed",
    providing_args={"batch_id", "position", "task", "attempt", "evidence", "runs_again", "items"},
)
verdict_overturned = Signal(name="verdict_overturned", providing_args={"batch_id", "position", "status"})
item_quarantined = Signal(name="item_quarantined", providing_args={"batch_id", "position", "task", "item"})
worker_lost = Signal(name="worker_lost", providing_args={"worker_id", "name", "hostname", "pid", "detected_by"})

__all__ = [
    "batch_ended",
    "batch_finished",
    "batch_paused",
    "batch_resumed",
    "batch_retried",
    "batch_started",
    "child_crashed",
    "child_settled",
    "item_quarantined",
    "verdict_overturned",
    "worker_lost",
]
