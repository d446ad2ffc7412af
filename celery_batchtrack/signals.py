"""Celery signals sent after the commit of what they tell. All have ``sender`` = the app.

========================  ==============================================================================
`batch_ended`             ``batch_id``, ``name``, ``status``
`child_settled`           ``batch_id``, ``position``, ``task``, ``status``, ``attempt``
`child_crashed`           ``batch_id``, ``position``, ``task``, ``attempt``, ``evidence``, ``runs_again``, ``items``
`worker_lost`             ``worker_id``, ``name``, ``hostname``, ``pid``, ``detected_by``
========================  ==============================================================================

A receiver runs in the process that wrote: a pool process, a worker's main process, or a client's.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

batch_ended = Signal(name="batch_ended", providing_args={"batch_id", "name", "status"})
child_settled = Signal(name="child_settled", providing_args={"batch_id", "position", "task", "status", "attempt"})
child_crashed = Signal(
    name="child_crashed",
    providing_args={"batch_id", "position", "task", "attempt", "evidence", "runs_again", "items"},
)
worker_lost = Signal(name="worker_lost", providing_args={"worker_id", "name", "hostname", "pid", "detected_by"})

__all__ = ["batch_ended", "child_crashed", "child_settled", "worker_lost"]
