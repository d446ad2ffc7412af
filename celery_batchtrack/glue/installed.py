"""`BatchTrack`, together with what installs itself through it."""

from __future__ import annotations

from . import chord  # registers its type, and an installer
from .extension import BatchTrack

__all__ = ["BatchTrack", "chord"]
