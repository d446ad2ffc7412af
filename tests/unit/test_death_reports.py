"""What the main process makes of the news that a pool process has died: of billiard's words, and of exit codes."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.common import human_status
from billiard.exceptions import WorkerLostError

from celery_batchtrack.behaviour.detector import Death
from celery_batchtrack.glue import request, worker
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.ids import Ticket, uuid7
from celery_batchtrack.vocabulary.states import Cause

CODES: list[tuple[int, tuple[Cause, str | None, int | None]]] = [
    (-signal.SIGSEGV, (Cause.SIGNAL, "SIGSEGV", None)),
    (-signal.SIGKILL, (Cause.SIGNAL, "SIGKILL", None)),
    (-signal.SIGABRT, (Cause.SIGNAL, "SIGABRT", None)),
    (-signal.SIGBUS, (Cause.SIGNAL, "SIGBUS", None)),
    (-signal.SIGRTMIN, (Cause.SIGNAL, "SIGRTMIN", None)),
    (-(signal.SIGRTMAX - 5), (Cause.SIGNAL, f"signal {signal.SIGRTMAX - 5}", None)),
    (0, (Cause.EXIT, None, 0)),
    (3, (Cause.EXIT, None, 3)),
    (70, (Cause.EXIT, None, 70)),
]


class Heard:
    """Stands for the attendant."""

    def __init__(self) -> None:
        self.deaths: list[Death] = []

    def died(self, death: Death) -> None:
        self.deaths.append(death)

    @property
    def told(self) -> list[tuple[Cause, str | None, int | None]]:
        return [(death.cause, death.signal, death.exit_code) for death in self.deaths]


@pytest.mark.parametrize(("code", "told"), CODES)
def test_an_exit_code_is_a_signal_or_a_code(code: int, told: tuple[Cause, str | None, int | None]) -> None:
    heard = Heard()
    worker._exited(SimpleNamespace(attendant=heard), 4711, code)
    assert heard.told == [told]
    assert heard.deaths[0].pid == 4711


@pytest.mark.parametrize(("code", "told"), CODES)
def test_billiards_words_are_understood(
    monkeypatch: pytest.MonkeyPatch, code: int, told: tuple[Cause, str | None, int | None]
) -> None:
    heard = Heard()
    asked: Any = SimpleNamespace(
        batchtrack_ticket=Ticket(uuid7(), SimpleNamespace(), 0),  # type: ignore[arg-type]
        app=SimpleNamespace(batchtrack=SimpleNamespace(attendant=heard)), worker_pid=4711, _batchtrack_started=7,
        _already_revoked=False, _already_cancelled=False,
    )  # fmt: skip
    monkeypatch.setattr(request, "_policy", lambda *arguments: RowPolicy())
    text = f"Worker exited prematurely: {human_status(code)} Job: 12."
    request._lost(asked, WorkerLostError(text))
    assert heard.told == [told]
    assert (heard.deaths[0].message, heard.deaths[0].pid_started) == (text, 7)
