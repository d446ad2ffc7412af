"""django-celery-beat: our entries are in its table, and what an administrator disables there stays disabled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import eventually
from tests.neighbours.apps.kit import unsent
from tests.neighbours.kit import Neighbour

DETECT, PRUNE = "celery_batchtrack.detect_crashes", "celery_batchtrack.prune"


@pytest.fixture
def scheduled(tmp_path: Path) -> Iterator[Neighbour]:
    scene = Neighbour(tmp_path, "beat", batchtrack_redispatch_after=0.5, batchtrack_detect_every=0.5)
    scene.more = {"SHOP_DATABASE": str(tmp_path / "shop.db"), "OWN_PLACE": scene.place("own")}
    yield scene
    scene.close()


def test_the_schedule_is_synced_and_a_disabled_entry_leaves_the_sweeps_to_the_workers(scheduled: Neighbour) -> None:
    made = scheduled.scripts(sync=[], disable=[])
    synced = made["sync"]
    assert synced["entries"] == ["batchtrack-detect-crashes", "batchtrack-prune", "celery.backend_cleanup", "own"]
    expiring = dict(synced["sent"])
    assert expiring[DETECT] and expiring[PRUNE], "they do not pile up while no worker runs"
    assert not expiring["scheduled.own"]
    assert made["disable"] == ["batchtrack-prune", "celery.backend_cleanup", "own"]

    signature = scheduled.app.signature("scheduled.own", args=[scheduled.place("child")])
    lost = scheduled.start(signature.set(queue="nobody"))
    with scheduled.app.connection_for_write() as connection, connection.channel() as channel:
        channel.queue_purge("nobody")
    with scheduled.worker("--queues=celery,nobody") as worker:
        # Not `wait`, which sweeps itself where nobody else does.
        eventually(lambda: lost.status == "completed", 20, what="the lost message sent again")
        eventually(lambda: "action=sweeps_itself" in worker.logs(), 20, what="a sweep that beat did not ask for")
        with unsent():
            late = scheduled.start(signature)
        eventually(lambda: late.status == "completed", 20, what="what its creator never sent")
        eventually(lambda: scheduled.lines("own"), what="the application's own periodic task")
