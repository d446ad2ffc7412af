"""The frame that `watch` shows on a terminal, by rich. Imported late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, OverflowMethod, RenderableType
from rich.table import Table
from rich.text import Text

from celery_batchtrack.surfaces.pages import how_it_died, item_in_hand, short, short_ids
from celery_batchtrack.surfaces.render import NOTHING, clean, cut, duration, number, rate
from celery_batchtrack.surfaces.watching import Object, Watch, Watched, bar_of

#: Class → colour, and what stands for it: where there are colours; where not; where there is nothing but ASCII.
_LOOKS = {
    "completed": ("green", "█", "█", "#"), "failed": ("yellow", "█", "x", "x"), "crashed": ("red", "█", "!", "!"),
    "cancelled": ("magenta", "█", "-", "-"), "running": ("blue", "█", "▒", ">"),
    "pending": ("bright_black", "░", "░", "."),
}  # fmt: skip
_STATES = {"completed": "green", "running": "blue", "partial": "yellow", "paused": "yellow", "open": "blue"}
_SHOWN_CRASHES = 5
#: Lines that are not rows of batches: header, how many more there are, deaths, what is wrong.
_AROUND = _SHOWN_CRASHES + 5
_NAME = 40
_GAP = "  "
_TITLES = ("ID", "BATCH", "PROGRESS", "", "DONE/TOTAL", "FAIL", "CRASH", "RATE", "LEFT", "STATE")
_TEXTS, _WIDE_ONLY = ("ID", "BATCH", "PROGRESS", "STATE"), ("ID", "RATE")


def frame(console: Console, watch: Watch, trouble: str | None) -> Group:
    """All there is to see now. `trouble`: why it may be out of date."""
    rows = sorted(watch.batches.values(), key=lambda each: each.over)  # what still runs comes first
    room = max(3, console.size.height - _AROUND)
    parts: list[RenderableType] = [_table(console, rows[:room])] if rows else []
    if len(rows) > room:
        parts.append(Text(f"and {len(rows) - room} more", style="dim"))
    parts += _crashes(console, watch)
    if trouble:
        parts.append(_text(console, trouble, "yellow", whole=True))
    return Group(*parts)


def _table(console: Console, rows: Sequence[Watched]) -> Table:
    narrow = console.size.width < 100
    titles = [each for each in _TITLES if not (narrow and each in _WIDE_ONLY)]
    cells = 12 if narrow else max(12, min(30, console.size.width - 100))
    ids = short_ids([each.batch["id"] for each in rows])
    lines = [list(_cells(console, id, each, cells, narrow=narrow)) for id, each in zip(ids, rows, strict=True)]
    widths = [max(len(title), *(line[at].cell_len for line in lines)) for at, title in enumerate(titles)]
    excess = sum(widths) + len(_GAP) * len(widths) - console.size.width
    for title, least in (("BATCH", 16), ("STATE", 9), ("BATCH", 5)):  # these give way, numbers do not
        given = max(0, min(excess, widths[titles.index(title)] - least))
        widths[titles.index(title)] -= given
        excess -= given
    table = Table(box=None, padding=(0, len(_GAP), 0, 0), header_style="dim", show_edge=False)
    for title, width in zip(titles, widths, strict=True):
        table.add_column(
            title, width=width, no_wrap=True, justify="left" if title in _TEXTS else "right", overflow=_cut(console)
        )
    for line in lines:
        table.add_row(*line)
    return table


def _cells(console: Console, id: str, watched: Watched, cells: int, *, narrow: bool) -> Iterator[Text]:
    each = watched.batch
    done = each["total"] - each["pending"] - each["running"]
    moving = not each["finished_at"] and not each["paused_at"]
    if not narrow:
        yield Text(id, style="dim")
    yield _text(console, cut(clean(each["name"]), _NAME))
    yield _bar(console, each, cells)
    yield Text(f"{each['progress_percent']}%")
    yield Text(f"{number(done)}/{number(each['total'])}")
    for name, colour in (("failed", "yellow"), ("crashed", "bold red")):
        yield Text(number(each[name]), style=colour if each[name] else "dim")
    if not narrow:
        yield _text(console, rate(each["rate"]))
    yield _text(console, duration(each["eta"]) if moving else NOTHING)
    yield _text(console, watched.state, _STATES.get(watched.state, "red" if watched.over else "yellow"))


def _bar(console: Console, each: Object, cells: int) -> Text:
    at = 3 if not _unicode(console) else 1 if console.color_system and not console.no_color else 2
    bar = Text()
    for name, count in bar_of(each, cells):
        look = _LOOKS[name]
        bar.append(look[at] * count, style=look[0])
    return bar


def _crashes(console: Console, watch: Watch) -> Iterator[Text]:
    names = {each.batch["id"]: each.batch["name"] for each in watch.batches.values()}
    for one in reversed(watch.crashes[-_SHOWN_CRASHES:]):
        yield _text(console, _crash(one, names), "red")
    if len(watch.crashes) > _SHOWN_CRASHES:
        yield Text("older ones: batchtrack crashes", style="dim")


def _crash(one: Object, names: dict[str, Any]) -> str:
    when = one["died_at"] or one["detected_at"]
    name = short(names.get(str(one["batch_id"]), one["batch_id"]), 24)
    frame = f"  {short(one['python_frame'], 40)}" if one["python_frame"] else ""
    host = f"  ({short(one['hostname'], 24)})" if one["hostname"] else ""
    item = short(item_in_hand(one) or one["task"], 40)
    return f"{when:%H:%M:%S}Z  {name} #{one['position']}  {clean(how_it_died(one))}  {item}{frame}{host}"


def _text(console: Console, text: str, style: str = "", *, whole: bool = False) -> Text:
    """Never markup, whatever a user named; in letters that the terminal's encoding has. `whole`: on several lines
    rather than cut."""
    line = clean(text)
    if not _unicode(console):
        line = line.replace(NOTHING, "-").replace("…", "~").encode("ascii", "replace").decode("ascii")
    return Text(line, style=style, no_wrap=not whole, overflow="fold" if whole else _cut(console))


def _cut(console: Console) -> OverflowMethod:
    return "ellipsis" if _unicode(console) else "crop"


def _unicode(console: Console) -> bool:
    return str(console.encoding).lower().startswith("utf")
