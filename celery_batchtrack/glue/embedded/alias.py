"""Makes ``batchtrack+filesystem://`` known to kombu; light enough to be imported by every process."""

from __future__ import annotations

import kombu.transport

#: The part of a broker URL before the ``+``.
SCHEME = "batchtrack"


def register() -> None:
    """Let kombu resolve ``batchtrack+filesystem://...``; may be called any number of times.

    The transport itself is imported by kombu when the first connection needs it.
    """
    kombu.transport.TRANSPORT_ALIASES[SCHEME] = "celery_batchtrack.glue.embedded.transport:Transport"
