"""``import celery_batchtrack.flower_plugin``: the one line of a ``flowerconfig.py`` that puts batches into Flower."""

from __future__ import annotations

from celery_batchtrack.surfaces.flower.install import install

install()
