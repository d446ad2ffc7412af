"""Metrics for Prometheus: a snapshot that a thread of its own refreshes, and a collector that only formats it.

A scrape never waits for the database, and never fails: while that is away, ``celery_batchtrack_up`` is 0, and the rest
is left out, as exporters of databases do it, so that nobody takes old values for new ones.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from celery_batchtrack import errors
from celery_batchtrack.store import reading_at_most

from . import figures
from .figures import Distribution, Family, Metric, Values

if TYPE_CHECKING:
    from prometheus_client.registry import CollectorRegistry

    from celery_batchtrack.glue.extension import BatchTrack

logger = logging.getLogger("celery_batchtrack")

#: Seconds between two refreshes, and between two looks for violated invariants, which read all rows.
EVERY = 10.0
EVERY_INVARIANTS = 300.0
#: A refresh that takes longer counts as failed, until it is done after all; PostgreSQL gives up each of its statements
#: after that time.
TIMEOUT = 10.0
TIMEOUT_INVARIANTS = 60.0
#: At most one part in so many of the time is spent in refreshing, but nobody waits longer than that for news.
_IDLE_FOR, _IDLE_AT_MOST = 4, 60.0
_EXTRA = "pip install 'celery-batchtrack[metrics]'"


class Snapshot:
    """The values of the last refresh, for any number of readers.

    `read` is called in a thread of its own, every `every` seconds, or more seldom where it takes long. A statement of
    its reads may take `timeout` seconds.
    """

    def __init__(
        self, read: Callable[[], list[Family]], *, every: float = EVERY, timeout: float = TIMEOUT, name: str = "metrics"
    ) -> None:
        self._read, self.every, self.timeout, self._name = read, every, timeout, name
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._began: float | None = None  # of the refresh under way
        self._good: tuple[list[Family], float, float] | None = None  # and when, by the two clocks of this process
        self._idle = math.inf  # until the next refresh is to begin; only the thread plans one
        self.error: Exception | None = None

    def start(self) -> None:
        """In this process; a fork has to start its own."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._stop.clear()
                self._began = time.monotonic()
                self._thread = threading.Thread(target=self._run, name=f"batchtrack-{self._name}", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """Soon: a refresh under way is not waited for."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self.refresh()
            self._idle = self.idle_after(time.monotonic() - began)
            self._stop.wait(self._idle)

    def idle_after(self, took: float) -> float:
        """Seconds until the refresh after one that took so many. What failed says nothing of how long a read takes."""
        return self.every if self.error is not None else max(self.every, min(_IDLE_FOR * took, _IDLE_AT_MOST))

    def refresh(self) -> None:
        """Now, in the calling thread. Never raises: `error` says what was wrong."""
        self._began = time.monotonic()
        try:
            with reading_at_most(self.timeout):
                values = self._read()
            self._good = (values, time.time(), time.monotonic())
        except Exception as error:  # noqa: BLE001 (whatever it is: it ends neither this thread nor a scrape)
            self._failed(error)
        else:
            if self.error is not None:
                logger.warning("action=metrics_back the tracking database answers again (%s)", self._name)
            self.error = None
        finally:
            self._began = None

    def _failed(self, error: Exception) -> None:
        """Told once."""
        if self.error is None:
            expected = isinstance(error, errors.BatchTrackError)
            logger.error("action=metrics_away no %s: %s", self._name, error, exc_info=None if expected else error)
        self.error = error

    @property
    def up(self) -> bool | None:
        """Whether the last refresh succeeded, no longer one hangs, and the next is not overdue; None while the first
        goes on."""
        now, began, good = time.monotonic(), self._began, self._good
        if began is not None and now - began > self.timeout:
            return False
        if self.error is not None:
            return False
        return None if good is None else now - good[2] <= self.timeout + self._idle

    @property
    def taken_at(self) -> float | None:
        """When the values were read: seconds since 1970, by this process's clock."""
        return None if self._good is None else self._good[1]

    @property
    def values(self) -> list[Family]:
        """None of them while the database is away."""
        return self._good[0] if self._good is not None and self.up else []


def families(snapshots: Sequence[Snapshot]) -> Iterator[Family]:
    """What is told now; the first snapshot says whether the database is there."""
    first = snapshots[0]
    if first.up is not None:
        yield figures.UP, {(): int(first.up)}
    if first.taken_at is not None:
        yield figures.SNAPSHOT, {(): first.taken_at}
    if first.up:
        for each in snapshots:
            yield from each.values


def snapshots_of(
    extension: BatchTrack, *, invariants: bool = False, every: float = EVERY, timeout: float = TIMEOUT
) -> list[Snapshot]:
    """Of an app's tracking database, not started."""
    made = [Snapshot(lambda: figures.read(extension.store), every=every, timeout=timeout)]
    if invariants:
        made.append(
            Snapshot(
                lambda: figures.read_invariants(extension.store), every=EVERY_INVARIANTS,
                timeout=TIMEOUT_INVARIANTS, name="invariants",
            )
        )  # fmt: skip
    return made


# -- prometheus_client ------------------------------------------------------------------------------


def _prometheus() -> Any:
    try:
        import prometheus_client.core
    except ModuleNotFoundError as error:
        raise errors.ImproperlyConfigured(
            f"metrics need the package prometheus-client ({error.name} is missing): {_EXTRA}"
        ) from None
    return prometheus_client


def collector(*snapshots: Snapshot) -> Any:
    """A collector for a registry of prometheus_client. Raises ImproperlyConfigured without that package."""
    core = _prometheus().core

    class Collector:
        def collect(self) -> Iterable[Any]:
            return [_exposed(core, *each) for each in families(snapshots)]

        def describe(self) -> Iterable[Any]:
            return []  # or to register it would collect

    return Collector()


def _exposed(core: Any, metric: Metric, values: Values) -> Any:
    made = {
        "gauge": core.GaugeMetricFamily, "counter": core.CounterMetricFamily, "histogram": core.HistogramMetricFamily
    }[metric.kind](figures.PREFIX + metric.name, metric.help, labels=metric.labels)  # fmt: skip
    for labels, value in values.items():
        if isinstance(value, Distribution):
            made.add_metric(labels, figures.buckets(value), value.sum)
        else:
            made.add_metric(labels, value)
    return made


def text(snapshots: Sequence[Snapshot]) -> str:
    """In Prometheus's text format."""
    client = _prometheus()
    registry = client.CollectorRegistry()
    registry.register(collector(*snapshots))
    made: str = client.generate_latest(registry).decode()
    return made


#: Collectors that are registered already, with the app's extension.
_registered: weakref.WeakKeyDictionary[Any, tuple[BatchTrack, Any]] = weakref.WeakKeyDictionary()
_registering = threading.Lock()


def register(
    extension: BatchTrack, registry: CollectorRegistry | None = None, *, invariants: bool = False,
    every: float = EVERY, timeout: float = TIMEOUT,
) -> Any:  # fmt: skip
    """Put an app's metrics into a registry (by default prometheus_client's own), and keep them fresh. Returns the
    collector; a second time, the same.

    Arguments:
        invariants: also look for violated ones, every few minutes. In one process of all: it reads every row.

    Errors: ImproperlyConfigured without prometheus_client, or if the registry has another app's: names would be twice.
    """
    registry = registry if registry is not None else _prometheus().REGISTRY
    with _registering:
        before = _registered.get(registry)
        if before is not None:
            if before[0] is not extension:
                raise errors.ImproperlyConfigured("this registry has the metrics of another app: use one for each")
            return before[1]
        snapshots = snapshots_of(extension, invariants=invariants, every=every, timeout=timeout)
        made = collector(*snapshots)
        registry.register(made)
        for each in snapshots:
            each.start()
        made.snapshots = snapshots
        _registered[registry] = (extension, made)
        return made


def unregister(registry: CollectorRegistry | None = None) -> None:
    """Take them out again, and read nothing any more. Idempotent."""
    registry = registry if registry is not None else _prometheus().REGISTRY
    with _registering:
        _, made = _registered.pop(registry, (None, None))
        if made is not None:
            registry.unregister(made)
            for each in made.snapshots:
                each.stop()


class Endpoint:
    """``/metrics`` on a port, of one app, in a thread. Raises OSError if the port is taken."""

    def __init__(
        self, extension: BatchTrack, port: int, address: str, *, invariants: bool = False, every: float = EVERY
    ) -> None:
        client = _prometheus()
        registry = client.CollectorRegistry()
        self._server, self._thread = client.start_http_server(port, address, registry)
        self.port: int = self._server.server_port
        os.register_at_fork(after_in_child=self._server.socket.close)  # a pool process that outlives us keeps no port
        self._registry = registry
        register(extension, registry, invariants=invariants, every=every)

    def close(self) -> None:
        unregister(self._registry)
        self._server.shutdown()
        self._server.server_close()


__all__ = ["Endpoint", "Snapshot", "collector", "families", "register", "snapshots_of", "text", "unregister"]
