"""A worker's own ``/metrics``, if `batchtrack_metrics_port` is set: a bootstep that Celery loads by its name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from celery import bootsteps

from celery_batchtrack import errors

if TYPE_CHECKING:
    from .metrics import Endpoint

logger = logging.getLogger("celery_batchtrack")


class MetricsStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """In the main process only, after its pool has forked. Trouble here never ends a worker."""

    label = "batchtrack-metrics"
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._endpoint: Endpoint | None = None
        extension = worker.app.batchtrack
        self.enabled = extension.wanted_in_worker() and extension.settings.metrics_port is not None

    def start(self, worker: Any) -> None:
        from . import metrics

        extension = worker.app.batchtrack
        port, address = extension.settings.metrics_port, extension.settings.metrics_address
        try:
            self._endpoint = metrics.Endpoint(extension, port, address)
        except OSError as error:
            logger.error(
                "action=metrics_unserved %s cannot listen on %s:%d (%s): this worker serves no metrics. If there are "
                "several on this host, give one of them the port (BATCHTRACK_METRICS_PORT), or run "
                "`celery … batchtrack metrics` instead", worker.hostname, address, port, error,
            )  # fmt: skip
        except errors.ImproperlyConfigured as error:
            logger.error("action=metrics_unserved %s: %s", worker.hostname, error)
        else:
            logger.info("action=metrics_served http://%s:%d/metrics", address, port)

    def stop(self, worker: Any) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    terminate = stop


__all__ = ["MetricsStep"]
