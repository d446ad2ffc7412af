"""A child's items in its stored arguments: found, cut in parts, and handed on to successors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from celery_batchtrack import errors
from celery_batchtrack.vocabulary.aftermath import Killer, Part
from celery_batchtrack.vocabulary.crash_policy import Action, RowPolicy
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import is_name_of_index
from celery_batchtrack.vocabulary.records import ChildRow
from celery_batchtrack.vocabulary.states import Status

from .tracker import Codec


@dataclass(frozen=True, slots=True)
class Items:
    """The items of one child, as its row has them: arguments and identifiers."""

    signature: dict[str, Any]
    path: tuple[str | int, ...]
    values: list[Any]
    names: tuple[str, ...]

    def chosen(self, indices: Sequence[int], codec: Codec) -> tuple[tuple[str, ...], str]:
        """(identifiers, signature) of a child with these items only."""
        signature = _with(self.signature, self.path, [self.values[index] for index in indices])
        return tuple(self.names[index] for index in indices), codec.dumps(signature)

    def part(
        self, indices: Sequence[int], codec: Codec, status: Status = Status.PENDING, told: Evidence | None = None
    ) -> Part:
        """A successor with these items only."""
        names, signature = self.chosen(indices, codec)
        kept = None if status is Status.COMPLETED else signature
        return Part(names, len(names), kept, str(uuid.uuid4()), status, told)


def _with(holder: Any, path: Sequence[str | int], value: Any) -> Any:
    """A copy in which something else stands at the end of the path; the rest is shared, however deep it is."""
    if not path:
        return value
    copied: Any = list(holder) if isinstance(holder, list | tuple) else dict(holder)
    copied[path[0]] = _with(holder[path[0]], path[1:], value)
    return copied


def items_of(row: ChildRow, path: Sequence[str | int] | None, codec: Codec) -> Items | None:
    """None where the row does not hold its items any more, or not as a list of as many as it has identifiers."""
    if path is None or row.signature is None:
        return None
    try:
        signature = codec.loads(row.signature)
        found: Any = signature
        for step in path:
            found = found[step]
    except (LookupError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(found, list | tuple) or len(found) != len(row.items) or len(found) != row.item_count:
        return None
    return Items(signature, tuple(path), list(found), tuple(row.items))


def item_hash(name: str, value: Any) -> str:
    """Names an item over all batches, in 32 hexadecimal digits: by its identifier, or by what it is where it has
    none of its own."""
    told = name
    if is_name_of_index(name):
        with contextlib.suppress(ValueError, RecursionError):  # nested too deep: its index is all there is
            told = "=" + json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(told.encode("utf-8", "replace")).hexdigest()[:32]


def killer_of(row: ChildRow, policy: RowPolicy, evidence: Evidence, version: str | None, codec: Codec) -> Killer | None:
    """The item that this death is blamed on, if it is known and its task counts such deaths."""
    if policy.quarantine_after is None:
        return None
    index = 0 if row.item_count == 1 else evidence.item_index
    items = items_of(row, policy.items, codec)
    if items is None or index is None or index >= len(items.names):
        return None
    name = items.names[index]
    return Killer(name[:255], item_hash(name, items.values[index]), version or "", policy.quarantine_after)


# -- parts ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """How a dead child's items are divided. `own`: the split child's own evidence, where no part carries it."""

    parts: list[Part]
    own: Evidence | None


def cut(
    row: ChildRow, policy: RowPolicy, action: Action, evidence: Evidence, codec: Codec, *, isolated: bool = False,
    queue: str | None = None,
) -> Cut | None:  # fmt: skip
    """The successors of a child that died, as the judgement says. None where its items cannot be taken apart."""
    items = items_of(row, policy.items, codec)
    if items is None:
        return None
    try:
        return _cut(items, action, evidence, codec, isolated, queue)
    except (errors.NotSerialisable, RecursionError):  # nested so deep that it was only just readable
        return None


def _cut(
    items: Items, action: Action, evidence: Evidence, codec: Codec, isolated: bool, queue: str | None
) -> Cut | None:
    count, index = len(items.values), evidence.item_index

    def part(indices: Sequence[int], status: Status = Status.PENDING, told: Evidence | None = None) -> Part:
        made = items.part(indices, codec, status, told)
        return replace(made, isolated=isolated and status is Status.PENDING, queue=queue)

    if action is Action.BISECT:
        middle = (count + 1) // 2
        return Cut([part(range(middle)), part(range(middle, count))], evidence)
    if index is None or not 0 <= index < count:
        return None
    killed = part([index], Status.CRASHED, replace(evidence, item=items.names[index]))
    done, left = range(index), range(index + 1, count)
    if action is Action.SKIP:
        return Cut([killed, part([*done, *left])], None)
    if items.signature.get("chain"):  # what is done at this link has the others still before it
        return Cut([killed, part([*done, *left])] if done or left else [killed], None)
    finished = [part(done, Status.COMPLETED)] if done else []
    if action is Action.GO_ON:
        return Cut([*finished, part(range(index, count))], evidence)
    return Cut([*finished, killed, *([part(left)] if left else [])], None)


def set_aside(items: Items, condemned: Sequence[int], evidence: Sequence[Evidence], codec: Codec) -> list[Part]:
    """Parts of a child some of whose items are in quarantine: each of those alone and crashed, the others together."""
    parts = [
        items.part([index], codec, Status.CRASHED, told) for index, told in zip(condemned, evidence, strict=True)
    ]
    out = set(condemned)
    left = [index for index in range(len(items.values)) if index not in out]
    return [*parts, items.part(left, codec)] if left else parts
