"""Nothing but Celery and this package."""

from __future__ import annotations

from celery import Celery

from celery_batchtrack import BatchTrack
from tests.neighbours.apps.kit import configured

app = configured(Celery("plain", set_as_current=False))
BatchTrack(app)
