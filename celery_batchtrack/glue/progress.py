"""Progress on a terminal: a bar with rich, plain lines without it, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from celery_batchtrack.vocabulary.records import Progress


def shown(steps: Iterator[Progress], *, bar: bool) -> Iterator[Progress]:
    """Pass `steps` through, showing each on standard error."""
    if not bar:
        return steps
    try:
        import rich.progress  # noqa: F401
    except ModuleNotFoundError:
        return _lines(steps)
    return _rich(steps) if sys.stderr.isatty() else _lines(steps)


def line(progress: Progress) -> str:
    """One line: name, percent, children, failures, rate and time left."""
    parts = [f"{progress.name} {progress.percent}%", f"{progress.items_settled}/{progress.items_total} items"]
    for name in ("failed", "crashed", "cancelled"):
        if getattr(progress, name):
            parts.append(f"{getattr(progress, name)} {name}")
    if progress.paused_at is not None and not progress.ended:
        parts.append(f"PAUSED ({progress.pause_reason})")
    if progress.rate is not None:
        parts.append(f"{progress.rate:.1f}/s")
    if not progress.ended and progress.eta is not None:
        parts.append(f"{progress.eta:.0f} s left")
    return "  ".join(parts)


def _lines(steps: Iterator[Progress]) -> Iterator[Progress]:
    last: object = None
    for progress in steps:
        text, told = line(progress), (progress.percent, progress.paused_at)
        if told != last or progress.ended:
            print(text, file=sys.stderr, flush=True)
            last = told
        yield progress


def _rich(steps: Iterator[Progress]) -> Iterator[Progress]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task("", total=100, text="")
        for progress in steps:
            text = line(progress).removeprefix(progress.name).strip()
            bars.update(task, completed=progress.percent, description=escape(progress.name), text=escape(text))
            yield progress
