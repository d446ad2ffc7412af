"""A task of no app in particular. Apart from `crashes`, since a shared task joins every app of its process."""

from __future__ import annotations

from typing import Any

from celery import shared_task

from celery_batchtrack import tracked


@shared_task(name="crashes.shared")
@tracked(items="docs", item_id=("db", "id"))
def shared(docs: list[dict[str, Any]], how: str, place: str = "") -> Any:
    from tests.acceptance.apps import crashes

    return crashes.end(how, place)
