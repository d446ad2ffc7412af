"""``python -m examples.annotations.demo``: makes a file of documents, two of which kill, and uploads it.

The text is what every Python ships: the paragraphs of its own reference manual, as ``help()`` shows them.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from examples.annotations import cli, store

FOLDER = Path("demo")
DOCUMENTS = 240
KILLERS = (57, 171)
"""Positions of the documents that no parser without a depth limit survives."""
KILLING_DEPTH = 100_000
OUT_OF_TEXT = 100
"""Position of a document with a span outside its text: invalid, but nobody's death."""
BATCH_SIZE = 10
SHORTEST_PARAGRAPH = 120

Document = dict[str, Any]

_TERM = re.compile(
    r"\b(argument|attribute|class|exception|expression|function|identifier|iterator|method|module|name"
    r"|object|operator|sequence|statement|string|value)s?\b"
)


def main() -> int:
    """Makes the input, uploads it, and says how to look further."""
    FOLDER.mkdir(exist_ok=True)
    sample, output = FOLDER / "sample.jsonl", FOLDER / "annotations.db"
    write_sample(sample)
    killers = " and ".join(str(position + 1) for position in KILLERS)
    print(
        f"{sample}: {DOCUMENTS} documents, the paragraphs of Python's own manual, their terms annotated.\n"
        f"The documents in lines {killers} have attributes nested {KILLING_DEPTH:,} levels deep.\n"
        "They overflow the C stack of the parser: the worker process dies of SIGSEGV.\n"
        f"The document in line {OUT_OF_TEXT + 1} is merely invalid.\n"
        f"Uploading in batches of {BATCH_SIZE}, on the embedded broker, with two worker processes:\n",
        flush=True,
    )
    arguments = [str(sample), "--output", str(output), "--batch-size", str(BATCH_SIZE)]
    report = FOLDER / "report.json"
    status = cli.main([*arguments, "--json", str(report)])
    if status == cli.EXIT_SETTLED:
        print(_what_next(output, report))
    return status


def write_sample(path: Path) -> None:
    """Writes the documents, one a line."""
    with path.open("w", encoding="utf-8") as file:
        for position, document in enumerate(islice(_documents(), DOCUMENTS)):
            if position == OUT_OF_TEXT:
                beyond = len(document["text"]) + 1
                document["denotations"].append({"span": {"begin": 0, "end": beyond}, "obj": "Concept"})
            line = _deadly(document) if position in KILLERS else json.dumps(document)
            file.write(line + "\n")


def _documents() -> Iterator[Document]:
    """Enough of them: Python 3.11 to 3.13 ship more than a thousand such paragraphs."""
    for topic in sorted(topics):
        paragraphs = (" ".join(p.split()) for p in topics[topic].split("\n\n"))
        long_enough = (p for p in paragraphs if len(p) >= SHORTEST_PARAGRAPH)
        for divid, text in enumerate(long_enough):
            yield _annotated(topic, divid, text)


def _annotated(topic: str, divid: int, text: str) -> Document:
    terms = list(enumerate(_TERM.finditer(text), start=1))
    return {
        "sourcedb": "PythonDocs",
        "sourceid": topic,
        "divid": divid,
        "text": text,
        "denotations": [
            {"id": f"T{number}", "span": {"begin": term.start(), "end": term.end()}, "obj": "Concept"}
            for number, term in terms
        ],
        "attributes": [
            {"id": f"A{number}", "subj": f"T{number}", "pred": "term", "obj": term.group(1)}
            for number, term in terms
        ],
    }


def _deadly(document: Document) -> str:
    """The document with one deep attribute, which comes first: whose it is, is said only after it."""
    rest = json.dumps({key: value for key, value in document.items() if key != "attributes"})
    deep = "[" * KILLING_DEPTH + "]" * KILLING_DEPTH
    attribute = f'{{"id": "A1", "subj": "T1", "pred": "nested", "obj": {deep}}}'
    return f'{{"attributes": [{attribute}], {rest[1:]}'


def _what_next(output: Path, report: Path) -> str:
    found = json.loads(report.read_text())
    victim = f"{found['batch_id']} {found['crashed'][0]['child']}"
    url = cli.default_tracking_database(store.output_url(str(output)))
    celery = shlex.quote(str(Path(sys.executable).with_name("celery")))
    look = f"ANNOTATIONS_DATABASE_URL={shlex.quote(url)} {celery} -A examples.annotations.tasks batchtrack"
    return (
        f"\nThe documents are in {output}, the report in {report}. To look further:\n"
        f"  {look} crashes\n"
        f"  {look} stack {victim}\n"
        f"  {look} repro {victim} --output {FOLDER / 'repro'} --run\n"
    )


if __name__ == "__main__":
    sys.exit(main())
