"""The SQL views from the command line: their queries, their rows, what runs now, and what is stuck."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from celery_batchtrack.surfaces import jsonio
from celery_batchtrack.surfaces.console import READS, SCANS, put_json, put_lines, screen_of, storable, store_of
from celery_batchtrack.surfaces.group import DURATION, as_json, command
from celery_batchtrack.surfaces.pages import coloured, count, moment, short, short_ids, some
from celery_batchtrack.surfaces.render import NOTHING, Column, Screen, Table, clean, cut, duration

_COLUMN = 40
_LIMIT = click.IntRange(1, 1_000_000)


@command("sql", reads_for=SCANS)
@click.argument("name", required=False, callback=storable)
@click.option("--run", is_flag=True, help="Print the view's rows instead of its query.")
@click.option("--batch", "id", metavar="ID", help="With --run: only rows of this batch.")
@click.option("-n", "--limit", type=_LIMIT, default=100, show_default=True, help="With --run: so many rows at most.")
@as_json
def sql(ctx: click.Context, name: str | None, run: bool, id: str | None, limit: int, as_json: bool) -> None:
    """The SQL views: all of them with a line each, or the query of one, with others to begin with.

    What it prints for a view is SQL, for the tracking database that is configured. It needs no database to answer;
    with --run it has.
    """
    from celery_batchtrack.store.view_examples import examples_of
    from celery_batchtrack.store.views import VIEWS, named

    if name is None:
        if run or id:
            raise click.UsageError("--run and --batch go with a view's name", ctx)
        views = [{"name": each.relation, "summary": each.summary, "columns": each.columns} for each in VIEWS.values()]
        if as_json:
            put_json(views)
        else:
            put_lines(_view_list(screen_of(ctx), views))
        return
    if id is not None and not run:
        raise click.UsageError("--batch goes with --run", ctx)
    view, store = named(name), store_of(ctx)
    if run:
        _put_rows(ctx, view.name, id, limit, as_json)
        return
    query, examples = store.view_query(view.name), examples_of(view.name, sqlite=store.sqlite)
    if as_json:
        told = [{"what": what, "query": text} for what, text in examples]
        put_json([{
            "name": view.relation, "summary": view.summary, "columns": view.columns, "query": query, "examples": told,
        }])  # fmt: skip
        return
    put_lines([f"-- {view.relation}: {view.summary}", f"{query.strip()};"])
    put_lines(line for what, text in examples for line in ("", f"-- {what}", f"{text};"))


def _view_list(screen: Screen, views: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    table = Table(screen, [Column("VIEW"), Column("ANSWERS", elastic=True)])
    return table.lines((each["name"], each["summary"]) for each in views)


def _put_rows(ctx: click.Context, name: str, id: str | None, limit: int, as_json: bool) -> None:
    from celery_batchtrack import errors
    from celery_batchtrack.store.views import named

    store, view = store_of(ctx), named(name)
    where: dict[str, Any] = {}
    if id is not None:
        if "batch_id" not in view.columns:
            raise errors.InvalidOption(f"{view.relation} is not by batch: it has no column batch_id")
        where["batch_id"] = store.resolve(id)
    rows = store.view(name, where, limit=limit)
    if as_json:
        put_json(rows)
    else:
        put_lines(_rows(screen_of(ctx), view.columns, rows), "no rows")


def _rows(screen: Screen, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    table = Table(screen, [Column(each.upper(), elastic=True) for each in columns])
    return table.lines([_cell(row[each]) for each in columns] for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return cut(clean(jsonio.dumps(value) if isinstance(value, (list, dict)) else value), _COLUMN)


# -- what runs, what is stuck -------------------------------------------------------------------------


@command("running", reads_for=READS)
@click.option("--batch", "id", metavar="ID", help="Only of this batch.")
@click.option("--longer-than", **DURATION, help="Only what has run for longer than 10m, 2h, …")
@click.option("-n", "--limit", type=_LIMIT, default=1000, show_default=True, help="So many at most.")
@as_json
def running(ctx: click.Context, id: str | None, longer_than: float | None, limit: int, as_json: bool) -> None:
    """What runs now, longest first: since when, on whom, in which process, and whether that worker is heard of."""
    store = store_of(ctx)
    where = {} if id is None else {"batch_id": store.resolve(id)}
    rows = store.view("running", where, order_by=["started_at"], limit=limit)
    found = [row for row in rows if longer_than is None or row["running_seconds"] > longer_than]
    if as_json:
        put_json(found)
    else:
        put_lines(_running(screen_of(ctx), found), "nothing runs")


def _running(screen: Screen, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    table = Table(screen, [
        Column("BATCH"), Column("NAME", elastic=True), count("#"), Column("TASK", elastic=True),
        Column("ITEMS", elastic=True), count("TRY"), count("FOR"), Column("WORKER", elastic=True), count("PID"),
        count("LAST BEAT"), Column("STATE", colour=coloured),
    ])  # fmt: skip
    ids = short_ids([str(each["batch_id"]) for each in rows])
    return table.lines(
        (
            id, short(each["batch_name"], _COLUMN), each["position"], each["task"],
            short(some(each["items"] or ()), _COLUMN), each["attempt"], duration(each["running_seconds"]),
            each["worker"] or NOTHING, each["process_pid"] or each["pid"] or NOTHING,
            duration(each["beat_age_seconds"]), each["worker_state"] or "unknown",
        )
        for id, each in zip(ids, rows, strict=True)
    )  # fmt: skip


@command("stuck", reads_for=READS)
@click.option("-n", "--limit", type=_LIMIT, default=1000, show_default=True, help="So many at most.")
@as_json
def stuck(ctx: click.Context, limit: int, as_json: bool) -> None:
    """Batches that do not go on, and why.

    Exit code 1 if there are any.
    """
    found = store_of(ctx).view("stuck_batch", order_by=["-stuck_seconds"], limit=limit)
    if as_json:
        put_json(found)
    else:
        put_lines(_stuck(screen_of(ctx), found), "nothing is stuck")
    if found:
        ctx.exit(1)


def _stuck(screen: Screen, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    table = Table(screen, [
        Column("BATCH"), Column("NAME", elastic=True), Column("STATUS", colour=coloured),
        Column("REASON", colour=lambda text: "red"), count("FOR"), count("OPEN"), count("RUNNING"), Column("DETAIL"),
    ])  # fmt: skip
    ids = short_ids([str(each["batch_id"]) for each in rows])
    return table.lines(
        (
            id, short(each["name"], _COLUMN), each["status"], str(each["reason"]).replace("_", " "),
            duration(each["stuck_seconds"]), each["open"], each["running"], short(each["detail"] or "", 200),
        )
        for id, each in zip(ids, rows, strict=True)
    )  # fmt: skip
