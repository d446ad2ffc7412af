"""Dashboards and alert rules ask for what is there: metrics and labels that are told, SQL that runs on the views."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import yaml

from celery_batchtrack import BatchTrack
from celery_batchtrack.store.views import VIEWS
from celery_batchtrack.surfaces import figures, metrics
from tests.helpers import ROOT
from tests.integration.cli_kit import Seeds, death, make_app

FOLDER = ROOT / "docs" / "monitoring"
PROMETHEUS, POSTGRESQL = "grafana-prometheus.json", "grafana-postgresql.json"
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"][0]["rules"]

#: What a sample may be called, and its labels; those of a scrape come with each.
SAMPLES = {
    figures.PREFIX + each.name + suffix: {*each.labels, *more, "job", "instance"}
    for each in figures.ALL
    for suffix, more in (
        [("_bucket", ["le"]), ("_sum", []), ("_count", [])] if each.kind == "histogram" else [("", [])]
    )
}
_FUNCTIONS = {"absent", "by", "histogram_quantile", "increase", "max", "min", "rate", "sum", "topk"}


def board(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return made


def targets(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for panel in board(name)["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target


def expressions() -> list[tuple[str, str]]:
    alerts = [(rule["alert"], rule["expr"]) for rule in RULES]
    return alerts + [(title, target["expr"]) for title, target in targets(PROMETHEUS)]


def test_alerts_that_need_the_exporter_of_its_own_say_so() -> None:
    """What is not told fires no alert."""
    app = make_app("sqlite://")
    alone = {each.name for each in figures.ALL} - {metric.name for metric, _ in _told_without_asking(app)}
    assert alone == {"invariant_violations"}
    needing = [each for each in RULES if any(name in each["expr"] for name in alone)]
    assert [each["alert"] for each in needing] == ["BatchtrackInvariantViolated", "BatchtrackDetectionOverdue"]
    text = (ROOT / "docs" / "monitoring.md").read_text().partition("## Alerts")[0]
    for each in needing:
        assert "Only `batchtrack metrics` looks for it" in each["annotations"]["description"]
        assert f"`{each['alert']}`" in text, "the section on metrics says it, too"


def _told_without_asking(app: Any) -> list[figures.Family]:
    """By a worker and by Flower."""
    extension = BatchTrack.of(app)
    snapshots = metrics.snapshots_of(extension)
    for each in snapshots:
        each.refresh()
    told = list(metrics.families(snapshots))
    extension.reset()
    return told


def check(expression: str) -> None:
    """As far as that goes without Prometheus: names, labels, brackets, ranges."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    for opening, closing in ("()", "[]", "{}"):
        assert bare.count(opening) == bare.count(closing), expression
    used = re.findall(r"\b(celery_batchtrack_\w+)(\{[^}]*\})?(\[[^\]]*\])?", bare)
    assert used, expression
    known: set[str] = set()
    for name, matchers, window in used:
        assert name in SAMPLES, f"{name} is not told"
        known |= SAMPLES[name]
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers):
            assert label in SAMPLES[name], f"{name} has no label {label}"
        counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
        assert counter == bool(window), f"{name}: a counter has a range, a gauge has none"
        assert not window or re.fullmatch(r"\[(\d+[smhd]|\$__rate_interval)\]", window), window
    for labels in re.findall(r"\bby\s*\(([^)]*)\)", bare):
        assert {each.strip() for each in labels.split(",")} <= known, f"{labels} in {expression}"
    assert set(re.findall(r"([a-z_]+)\s*\(", bare)) <= _FUNCTIONS, expression


@pytest.mark.parametrize("name", [PROMETHEUS, POSTGRESQL])
def test_a_dashboard_can_be_imported_anywhere(name: str) -> None:
    made = board(name)
    assert made["id"] is None and made["uid"] and made["schemaVersion"] == 39
    assert made["tags"] == ["celery", "batchtrack"]
    kinds = {each["name"]: each for each in made["templating"]["list"]}
    assert kinds["datasource"]["type"] == "datasource"
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps(made["panels"]))
    assert set(sources) == {"${datasource}"}, "no data source of ours is wired in"
    ids = [each["id"] for each in made["panels"]]
    assert len(set(ids)) == len(ids)
    rows = [each["title"] for each in made["panels"] if each["type"] == "row"]
    assert rows[:3] == ["Overview", "Tasks", "Top tables"]
    places = [each["gridPos"] for each in made["panels"]]
    for at, one in enumerate(places):
        assert one["x"] + one["w"] <= 24
        for other in places[:at]:
            apart = one["x"] >= other["x"] + other["w"] or other["x"] >= one["x"] + one["w"]
            assert apart or one["y"] >= other["y"] + other["h"], "panels do not overlap"


def test_every_expression_asks_for_metrics_and_labels_that_are_told() -> None:
    for _, expression in expressions():
        check(expression)
    variables = [each["query"] for each in board(PROMETHEUS)["templating"]["list"] if each["type"] == "query"]
    for query in variables:
        name, label = re.findall(r"label_values\((\w+).*, (\w+)\)", query["query"])[0]
        assert label in SAMPLES[name]
    asked = " ".join(expression for _, expression in expressions())
    unasked = [name for name in SAMPLES if name not in asked]
    assert unasked == ["celery_batchtrack_snapshot_timestamp_seconds"]


def test_every_alert_says_what_to_do() -> None:
    text = (FOLDER.parent / "monitoring.md").read_text()
    wanted = {
        "DetectorSilent", "CrashRateHigh", "ManyCrashes", "BatchStuck", "WorkerLost", "InvariantViolated", "BatchSlow",
        "DatabaseUnreachable",
    }  # fmt: skip
    assert {f"Batchtrack{each}" for each in wanted} <= {rule["alert"] for rule in RULES}
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        for name in ("summary", "description", "runbook"):
            assert len(rule["annotations"][name]) > 20, rule["alert"]
        assert f"`{rule['alert']}`" in text


def test_prometheus_itself_accepts_every_expression(tmp_path: Path) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("needs promtool")
    rules = [
        {"record": f"panel:{at}", "expr": expression.replace("$__rate_interval", "5m")}
        for at, (_, expression) in enumerate(expressions())
    ]
    (tmp_path / "all.yml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    for file in (FOLDER / "alerts.yml", tmp_path / "all.yml"):
        done = subprocess.run([tool, "check", "rules", str(file)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# -- SQL -------------------------------------------------------------------------------------------


def expanded(sql: str, batch_id: Any) -> str:
    """Grafana's macros and variables, as it writes them."""
    sql = re.sub(r"\$__timeFilter\((\w+)\)", r"\1 BETWEEN now() - interval '1 day' AND now() + interval '1 hour'", sql)
    sql = re.sub(
        r"\$__timeGroupAlias\((\w+), \$__interval\)", r'floor(extract(epoch from \1)/60)*60 AS "time"', sql
    )
    sql = sql.replace("${task:sqlstring}", "'shop.parse', 'shop.other'").replace("${batch:sqlstring}", f"'{batch_id}'")
    assert "$" not in sql, sql
    return sql


def test_every_statement_runs_on_the_views_and_finds_what_is_there(postgres_url: str) -> None:
    extension = BatchTrack.of(make_app(postgres_url))
    extension.migrate()
    seeds = Seeds(extension.store)
    batch_id = seeds.ended()
    worker, live = seeds.worker("w2@here"), seeds.batch("live")
    seeds.run(live, 0, worker)
    seeds.crash(seeds.run(live, 1, worker), death(item="PMC:1"))
    variables = [each["query"] for each in board(POSTGRESQL)["templating"]["list"] if each["type"] == "query"]
    panels = [(title, target) for title, target in targets(POSTGRESQL)]
    empty = set()
    with extension.store.engine.connect() as connection:
        for title, sql in [*((each, each) for each in variables), *((each, to["rawSql"]) for each, to in panels)]:
            assert set(re.findall(r"\bFROM (\w+)", sql)) <= {each.relation for each in VIEWS.values()}, title
            if not connection.execute(sa.text(expanded(sql, batch_id).replace(":", r"\:"))).all():
                empty.add(title)
        for title, target in panels:
            if target["format"] == "time_series":
                found = connection.execute(sa.text(expanded(target["rawSql"], batch_id)))
                assert "time" in found.keys(), title  # noqa: SIM118
    assert empty == {"Stuck batches"}
    extension.reset()
