"""Batches with those that are nested in them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import sqlalchemy as sa

from .schema import batch


def tree_of(ids: Sequence[uuid.UUID]) -> sa.CTE:
    """(root, id): each of these batches, and those nested in it at any depth. A circle, made by hand, ends."""
    tree = sa.select(batch.c.id.label("root"), batch.c.id).where(batch.c.id.in_(ids)).cte("tree", recursive=True)
    inner = batch.alias("inner_batch")
    return tree.union(
        sa.select(tree.c.root, inner.c.id).where(inner.c.parent_batch.is_not(None), inner.c.parent_batch == tree.c.id)
    )
