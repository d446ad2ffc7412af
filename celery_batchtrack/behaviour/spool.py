"""Outcomes on disk while the database is away, so that no end of a run is lost with its process."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.records import Ending
from celery_batchtrack.vocabulary.states import Cause, Status


@dataclass(frozen=True, slots=True)
class Spooled:
    """One run's undelivered end."""

    key: ChildKey
    token: uuid.UUID
    slot: str
    ending: Ending


def write(folder: Path, spooled: Spooled) -> Path:
    """Write one file, whole or not at all. Returns its path."""
    path = folder / "spool" / f"{spooled.token}.json"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(_as_json(spooled), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return path


def read_all(folder: Path) -> Iterator[tuple[Path, Spooled]]:
    """Every spooled end below a worker's folder. A broken file is set aside, not deleted."""
    for path in sorted((folder / "spool").glob("*.json")):
        try:
            yield path, _from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            continue  # delivered by its own process meanwhile
        except (ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                path.rename(path.with_suffix(".broken"))


def _as_json(spooled: Spooled) -> dict[str, object]:
    ending, evidence = spooled.ending, spooled.ending.evidence
    return {
        "batch": str(spooled.key.batch_id),
        "position": spooled.key.position,
        "token": str(spooled.token),
        "slot": spooled.slot,
        "status": ending.status.value,
        "result": ending.result,
        "cause": ending.cause,
        "keep_signature": ending.keep_signature,
        "evidence": None if evidence is None else evidence.as_json(),
    }


def _from_json(value: dict[str, object]) -> Spooled:
    evidence = value["evidence"]
    found = Evidence.from_json(evidence) if isinstance(evidence, dict) else None
    cause = None if value["cause"] is None else Cause(str(value["cause"]))
    result = None if value["result"] is None else str(value["result"])
    ending = Ending(Status(str(value["status"])), result, cause, found, bool(value.get("keep_signature")))
    key = ChildKey(uuid.UUID(str(value["batch"])), int(str(value["position"])))
    return Spooled(key, uuid.UUID(str(value["token"])), str(value["slot"]), ending)
