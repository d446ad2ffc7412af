"""Reads a file of annotated documents, one JSON object a line, without decoding them.

The process that cuts an upload in batches must survive every document, the one that kills a JSON parser
included. So it takes only what it needs, the top-level ``sourcedb``, ``sourceid`` and ``divid``, with a
scanner that keeps a count in place of a stack: linear in time, the same at ten levels of nesting and at
ten million.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

Identifier = int | str
IDENTIFYING_KEYS = frozenset({"sourcedb", "sourceid", "divid"})
MAX_IDENTIFIER_LENGTH = 255
"""Characters. Longer ones do not fit into PostgreSQL's index of the primary key (2,704 bytes a row)."""

_SPACE = re.compile(r"[ \t\r\n]*+")
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SCALAR = re.compile(r'[^\s,:"\[\]{}]++')
# What matters inside a nested value: strings, because they may hold brackets, and runs of brackets of one
# direction with whatever stands between them. The lone quote comes last: it is a string that never ends.
_NESTED = re.compile(r'(?P<string>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[\[{][^"\]}]*+|[\]}][^"\[{]*+|"', re.DOTALL)
_CLOSER = re.compile(r"[\]}]")
_CANONICAL_INTEGER = re.compile(r"-?[1-9][0-9]*|0")


class UnreadableInput(Exception):
    """The input is not a file that can be read. The message says which and why."""


class InvalidLine(ValueError):
    """A line is no document: the message is the reason."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One document: whose it is, and its line as it stands in the file, not decoded."""

    sourcedb: str
    sourceid: str
    divid: Identifier | None
    line_number: int
    line: str


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line that is no document. It counts as one invalid document."""

    line_number: int
    reason: str


def check_readable(path: Path) -> None:
    """Raises `UnreadableInput` for what `read` could not open, before anything has been started."""
    with _open(path):
        pass


def read(path: Path, on_rejected: Callable[[RejectedLine], None]) -> Iterator[Reference]:
    """Yields the documents of a file, in order; lines that are none go to `on_rejected`, blank ones nowhere.

    Holds one line at a time. Raises `UnreadableInput` only.
    """
    with _open(path) as file:
        try:
            for line_number, raw in enumerate(file, start=1):
                try:
                    line = _decoded(raw, first=line_number == 1)
                    if line:
                        yield reference(line, line_number)
                except InvalidLine as reason:
                    on_rejected(RejectedLine(line_number, str(reason)))
        except OSError as error:
            raise UnreadableInput(f"cannot read {path} any further: {error.strerror}") from error


def batches(references: Iterable[Reference], size: int) -> Iterator[list[Reference]]:
    """Cuts the documents in lists of `size` (the last may be shorter). Holds one list at a time."""
    if size < 1:
        raise ValueError(f"a batch needs at least one document, not {size}")
    iterator = iter(references)
    while part := list(islice(iterator, size)):
        yield part


def reference(line: str, line_number: int) -> Reference:
    """Finds out whose document a line is. Raises `InvalidLine`."""
    found = _identifying_values(line)
    return Reference(
        sourcedb=_identifier(found, "sourcedb"),
        sourceid=_identifier(found, "sourceid"),
        divid=_divid(found),
        line_number=line_number,
        line=line,
    )


def canonical_divid(value: Identifier) -> Identifier:
    """The divisions ``3`` and ``"3"`` of a document are one; ``"03"`` and ``"methods"`` are their own."""
    if isinstance(value, str) and len(value) < 19 and _CANONICAL_INTEGER.fullmatch(value):
        return int(value)
    return value


def _open(path: Path) -> BinaryIO:
    if path.is_dir():
        raise UnreadableInput(f"{path} is a folder, not a file of documents")
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise UnreadableInput(f"there is no file {path}") from error
    except OSError as error:
        raise UnreadableInput(f"cannot read {path}: {error.strerror}") from error


def _decoded(raw: bytes, *, first: bool) -> str:
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise InvalidLine(f"not UTF-8 at byte {error.start}") from error
    if "\0" in line:
        raise InvalidLine("holds a NUL byte, which JSON does not allow")
    return line.strip(" \t\r\n")


def _identifying_values(line: str) -> dict[str, str]:
    """The raw JSON text of the identifying values; of a key that occurs twice the last, as in `json`."""
    found: dict[str, str] = {}
    for key, start, end in _members(line):
        name = _key_name(key)
        if name in IDENTIFYING_KEYS:
            found[name] = line[start:end]
    return found


def _members(line: str) -> Iterator[tuple[str, int, int]]:
    """Yields raw key, start and end of value of each member of the object that the line is."""
    if not line.startswith("{"):
        raise InvalidLine("not a JSON object")
    position = _skip_space(line, 1)
    if line.startswith("}", position):
        position += 1
    else:
        while True:
            key_end = _string_end(line, position)
            start = _skip_space(line, _expect(line, ":", _skip_space(line, key_end)))
            end = _value_end(line, start)
            yield line[position:key_end], start, end
            position = _skip_space(line, end)
            if line.startswith("}", position):
                position += 1
                break
            position = _skip_space(line, _expect(line, ",", position))
    if _skip_space(line, position) != len(line):
        raise InvalidLine(f"more text after the JSON object, at character {position}")


def _value_end(line: str, start: int) -> int:
    if line.startswith('"', start):
        return _string_end(line, start)
    if line.startswith(("{", "["), start):
        return _nested_end(line, start)
    if scalar := _SCALAR.match(line, start):
        return scalar.end()
    raise InvalidLine(f"not JSON: a value is missing at character {start}")


def _nested_end(line: str, start: int) -> int:
    depth = 0
    for token in _NESTED.finditer(line, start):
        if token.lastgroup == "string":
            continue
        text = token.group()
        if text == '"':
            raise InvalidLine("not JSON: a string does not end")
        opened = text.count("[") + text.count("{")
        closed = 0 if opened else text.count("]") + text.count("}")
        if closed >= depth and not opened:
            return _nth_closer_end(line, token.start(), depth)
        depth += opened - closed
    raise InvalidLine("not JSON: the line ends inside a nested value")


def _nth_closer_end(line: str, start: int, count: int) -> int:
    closer = next(islice(_CLOSER.finditer(line, start), count - 1, None))
    return closer.end()


def _string_end(line: str, start: int) -> int:
    string = _STRING.match(line, start)
    if string is None:
        raise InvalidLine(f"not JSON: a string is missing or does not end at character {start}")
    return string.end()


def _skip_space(line: str, position: int) -> int:
    space = _SPACE.match(line, position)
    return space.end() if space else position


def _expect(line: str, character: str, position: int) -> int:
    if not line.startswith(character, position):
        raise InvalidLine(f"not JSON: '{character}' is missing at character {position}")
    return position + 1


def _key_name(raw: str) -> str:
    if "\\" not in raw:
        return raw[1:-1]
    try:
        return str(json.loads(raw))
    except ValueError:
        return raw[1:-1]  # an invalid escape: the child that decodes the document will say so


def _identifier(found: dict[str, str], key: str) -> str:
    value = _scalar(found, key)
    if value is None or value == "":
        raise InvalidLine(f"no {key}")
    return str(value)


def _divid(found: dict[str, str]) -> Identifier | None:
    value = _scalar(found, "divid")
    return None if value is None or value == "" else canonical_divid(value)


def _scalar(found: dict[str, str], key: str) -> Identifier | None:
    """A string, an integer or None (absent or null); anything else cannot name a document."""
    raw = found.get(key, "null")
    if raw[0] in "[{":
        raise InvalidLine(f"{key} is neither a string nor an integer")
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise InvalidLine(f"{key} is not JSON") from error
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InvalidLine(f"{key} is neither a string nor an integer")
    _check_identifier(key, str(value))
    return value


def _check_identifier(key: str, text: str) -> None:
    if len(text) > MAX_IDENTIFIER_LENGTH:
        raise InvalidLine(f"{key} is longer than {MAX_IDENTIFIER_LENGTH} characters")
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidLine(f"{key} holds a character that no database stores")
