"""One frozen, validated settings object."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import pytest

from celery_batchtrack.errors import ImproperlyConfigured
from celery_batchtrack.vocabulary.settings import Settings, seconds, suggestion


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (5, 5.0), (0.25, 0.25), ("5", 5.0), ("90s", 90.0), ("15m", 900.0), ("2h", 7200.0), ("7d", 604800.0),
        ("1w", 604800.0), ("250ms", 0.25), (" 1.5 h ", 5400.0), (timedelta(minutes=2), 120.0),
    ],
)  # fmt: skip
def test_durations_are_seconds_timedeltas_or_text(value: Any, wanted: float) -> None:
    assert seconds(value) == wanted


@pytest.mark.parametrize("value", ["", "soon", "5 years", "-5s", "1h30m", None, True, [], "5S"])
def test_what_is_no_duration_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="no duration"):
        seconds(value)


def test_the_defaults_are_those_of_the_protocol() -> None:
    settings = Settings.validated({})
    assert settings == Settings()
    assert (settings.heartbeat, settings.lease, settings.lease_shared_gil) == (5, 15, 60)
    assert (settings.detect_every, settings.claim_timeout, settings.shards) == (15, 30, 16)
    assert (settings.redispatch_after, settings.redispatch_wait, settings.max_crashes) == (30, 600, 3)
    assert settings.retention == {"completed": 7 * 86400, "other": 30 * 86400}
    assert settings.wait_poll == 0.5 and settings.enabled


def test_settings_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().heartbeat = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics_port", 65_536), ("metrics_port", 0),
        ("heartbeat", 0), ("heartbeat", -1), ("heartbeat", "soon"), ("lease", None), ("detect_every", 0),
        ("claim_timeout", -1), ("shards", 0), ("shards", 1.5), ("shards", True), ("shards", "many"), ("max_crashes", 0),
        ("enabled", "maybe"), ("enabled", 2), ("engine_options", []), ("retention", {"failed": 1}),
        ("retention", {"completed": "soon"}), ("retention", 0), ("dispatch_chunk", -5),
        ("app_version", "v" * 65),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_the_name_the_user_gave(name: str, value: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match=f"CELERY_BATCHTRACK_{name.upper()}"):
        Settings.validated({name: value}, lambda field: f"CELERY_BATCHTRACK_{field.upper()}")


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("enabled", "off", False), ("enabled", "Yes", True), ("metrics_port", "9808", 9808),
        ("enabled", 0, False), ("shards", "4", 4),
        ("auto_migrate", None, None), ("auto_migrate", "true", True), ("database_url", "", None),
        ("retention", "30d", {"completed": 30 * 86400.0, "other": 30 * 86400.0}),
        ("retention", {"other": "1d"}, {"completed": 7 * 86400.0, "other": 86400.0}),
        ("lease", "1m", 60.0), ("claim_timeout", 0, 0.0),
    ],
)  # fmt: skip
def test_a_value_is_read_from_text_as_environment_variables_give_it(name: str, value: Any, wanted: Any) -> None:
    assert getattr(Settings.validated({name: value}), name) == wanted


def test_a_lease_must_outlast_two_heartbeats() -> None:
    with pytest.raises(ImproperlyConfigured, match=r"lease.*twice.*heartbeat"):
        Settings.validated({"heartbeat": 10, "lease": 15})
    assert Settings.validated({"heartbeat": 7.5, "lease": 15}).lease == 15


def test_every_setting_has_a_unit_and_a_description() -> None:
    from dataclasses import fields

    for each in fields(Settings):
        assert each.metadata["unit"] and each.metadata["doc"], each.name
    assert Settings.names() == [each.name for each in fields(Settings)]


@pytest.mark.parametrize(
    ("typo", "meant"), [("hartbeat", "heartbeat"), ("databse_url", "database_url"), ("retentoin", "retention")]
)
def test_a_typo_is_answered_with_what_was_meant(typo: str, meant: str) -> None:
    assert suggestion(typo, Settings.names()) == f": did you mean '{meant}'?"


def test_what_resembles_nothing_is_answered_with_nothing() -> None:
    assert suggestion("zzzzzz", Settings.names()) == ""
