"""Text for terminals: aligned tables, bars and durations; nothing a user named reaches a terminal raw."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO

#: Shown where there is no value.
NOTHING = "\u2013"
_ESCAPE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f]).*?(?:\x07|\x1b\\|\x9c|$)"  # OSC, DCS, …: titles, links, clipboard
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_ASCII = str.maketrans({"█": "#", "░": ".", "…": "~", NOTHING: "-", "→": ">", "·": "-"})
_NARROWEST = 8
_GAP = "  "


def clean(text: object) -> str:
    """One line without escape sequences, control and invisible characters (bidirectional overrides too)."""
    plain = re.sub(r"[^\S ]+", " ", _ESCAPE.sub("", str(text)))
    return "".join(char for char in plain if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))


def harmless(text: str) -> str:
    """The same of several lines, with their tabs."""
    plain = _ESCAPE.sub("", text).replace("\r\n", "\n")
    return "".join(char for char in plain if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def width(text: str) -> int:
    """Cells that a cleaned text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(_cells(char) for char in text)


def _cells(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def cut(text: str, limit: int) -> str:
    """The text, or its beginning and an ellipsis, in at most `limit` cells."""
    if width(text) <= limit:
        return text
    kept, left = [], limit - 1
    for char in text:
        left -= _cells(char)
        if left < 0:
            break
        kept.append(char)
    return "".join(kept) + "…"


def padded(text: str, cells: int, *, right: bool = False) -> str:
    space = " " * (cells - width(text))
    return space + text if right else text + space


@dataclass(frozen=True, slots=True)
class Screen:
    """What standard output can show. `columns` is None where lines may be of any length."""

    encoding: str
    columns: int | None
    colour: bool

    @classmethod
    def of(cls, stream: IO[str], *, no_color: bool) -> Screen:
        terminal = stream.isatty()
        known = terminal or os.environ.get("COLUMNS", "").isdigit()
        return cls(
            encoding=getattr(stream, "encoding", None) or "ascii",
            columns=shutil.get_terminal_size().columns if known else None,
            colour=terminal and not no_color,
        )

    @property
    def unicode(self) -> bool:
        try:
            f"█░…→·{NOTHING}".encode(self.encoding)
        except (UnicodeError, LookupError):
            return False
        return True

    def printable(self, line: str) -> str:
        """A line that the encoding can express."""
        if self.unicode:
            return line.encode(self.encoding, "replace").decode(self.encoding)
        return line.translate(_ASCII).encode("ascii", "replace").decode("ascii")

    def style(self, text: str, colour: str | None) -> str:
        if colour is None or not self.colour:
            return text
        import click

        return click.style(text, fg=colour)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. An `elastic` one is cut where the terminal is too narrow."""

    title: str
    right: bool = False
    elastic: bool = False
    colour: Callable[[str], str | None] = lambda text: None


class Table:
    """Lines of a table. Rows are laid out page by page, so that a million of them need little memory."""

    def __init__(self, screen: Screen, columns: Sequence[Column], page: int = 500) -> None:
        self.screen, self.columns, self.page = screen, columns, page
        self._widths = [len(column.title) for column in columns]

    def lines(self, rows: Iterable[Sequence[object]]) -> Iterator[str]:
        """The header and a line per row; nothing at all without rows."""
        left, first = iter(rows), True
        while page := [[clean(cell) for cell in row] for row in islice(left, self.page)]:
            self._widths = [max(before, *(width(row[at]) for row in page)) for at, before in enumerate(self._widths)]
            widths = self._fitting()
            if first:
                yield self._line([column.title for column in self.columns], widths, header=True)
                first = False
            for row in page:
                yield self._line(row, widths)

    def _fitting(self) -> list[int]:
        widths = list(self._widths)
        if self.screen.columns is None:
            return widths
        elastic = [at for at, column in enumerate(self.columns) if column.elastic]
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - self.screen.columns
        while excess > 0 and elastic:
            widest = max(elastic, key=lambda at: widths[at])
            if widths[widest] <= _NARROWEST:
                break
            widths[widest] -= 1
            excess -= 1
        return widths

    def _line(self, cells: Sequence[str], widths: Sequence[int], *, header: bool = False) -> str:
        parts = []
        for cell, cells_wide, column in zip(cells, widths, self.columns, strict=True):
            # In ASCII a wide character becomes one question mark: widths are of what is printed.
            text = padded(self.screen.printable(cut(cell, cells_wide)), cells_wide, right=column.right)
            parts.append(text if header else self.screen.style(text, column.colour(cell)))
        return _GAP.join(parts).rstrip()


def bar(percent: int, cells: int = 14) -> str:
    """Full only at 100."""
    filled = percent * cells // 100
    return "█" * filled + "░" * (cells - filled)


def duration(seconds: float | None) -> str:
    """A few characters: ``0.4s``, ``53s``, ``3m``, ``2h``, ``5d``."""
    if seconds is None:
        return NOTHING
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    for limit, unit, size in ((120, "s", 1), (7200, "m", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds / 86_400:.0f}d"


def rate(per_second: float | None) -> str:
    if per_second is None:
        return NOTHING
    if per_second < 0.1:
        return f"{per_second * 60:.1f}/min"
    return f"{per_second:.0f}/s" if per_second >= 10 else f"{per_second:.1f}/s"


def number(value: int) -> str:
    """Thousands apart: ``10 000``."""
    return f"{value:,}".replace(",", " ")


def size(count: int) -> str:
    """Bytes in a few characters: ``812 kB``, ``41 MB``, ``3.2 GB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            value = count / factor
            return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"
    return f"{count} B"
