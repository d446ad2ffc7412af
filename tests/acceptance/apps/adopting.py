"""An application with a tenant in each message, as multi-tenant shops have it."""

from __future__ import annotations

import json
import os
from typing import Any

from celery import Celery, Task

from celery_batchtrack import BatchTrack


def tenant() -> dict[str, Any]:
    return {"tenant": os.environ["TENANT"], "trace": {"parent": os.getpid()}}


app = Celery("adopting", broker=os.environ["BATCHTRACK_TEST_BROKER_URL"], set_as_current=False)
app.conf.update(json.loads(os.environ["BATCHTRACK_TEST_CONF"]))
BatchTrack(app, capture=[tenant])


@app.task(bind=True, name="adopting.context", shared=False)
def context(self: Task, *args: Any) -> dict[str, Any]:
    """Everything that this run knows of its message."""
    request = self.request
    return {
        "tenant": request.get("tenant"),
        "trace": request.get("trace"),
        "own": request.get("own"),
        "id": request.id,
        "root": request.root_id,
        "parent": request.parent_id,
        "group": request.group,
        "stamps": request.stamps,
        "expires": request.expires,
        "priority": request.delivery_info.get("priority"),
        "queue": request.delivery_info.get("routing_key"),
        "process": os.environ["TENANT"],
    }
