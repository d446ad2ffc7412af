"""The command: uploads a file of annotated documents and reports what became of each.

Exit status: 0 every child settled (crashed ones included), 1 the batch could not end, 2 wrong usage,
69 a database cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from celery.exceptions import ImproperlyConfigured
from kombu.exceptions import OperationalError as BrokerError

from examples.annotations import documents, store

if TYPE_CHECKING:
    from celery_batchtrack import Batch
    from examples.annotations.outcome import CrashedDocument

EXIT_SETTLED, EXIT_NOT_ENDED, EXIT_USAGE, EXIT_UNAVAILABLE = 0, 1, 2, 69
ON_CRASH = ("record", "retry", "bisect", "skip", "resume")
CALLBACK_TIMEOUT = 60.0
"""Seconds to wait for the summary, once all children are settled."""
SHOWN_LINES = 20
"""Invalid lines, and invalid documents, that the printed report names."""


class CannotEnd(Exception):
    """The batch did not come to its end. The message says why and what to do."""


class UnusableBroker(Exception):
    """`--broker` names no transport that is installed."""


@dataclass(slots=True)
class Options:
    """What to upload, and with what."""

    input: Path
    batch_size: int
    concurrency: int
    output: str
    database: str
    broker: str | None
    report: Path | None
    timeout: float | None
    on_crash: str


@dataclass(slots=True)
class Report:
    """What became of the documents."""

    name: str
    batch_id: str
    status: str
    summary: store.Summary
    failed: int
    crashed: list[CrashedDocument]
    callbacks: int
    seconds: float
    rejected: list[documents.RejectedLine] = field(default_factory=list)
    invalid: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The form that `--json` writes."""
        summary = self.summary
        return {
            "batch_id": self.batch_id,
            "status": self.status,
            "documents": {
                "total": summary.total,
                "stored": summary.stored,
                "invalid": summary.invalid,
                "crashed": summary.crashed,
            },
            "crashed": [
                {
                    "sourcedb": d.sourcedb,
                    "sourceid": d.sourceid,
                    "divid": d.divid,
                    "signal": d.signal,
                    "frame": d.frame,
                    "child": d.child,
                }
                for d in self.crashed
            ],
            "callbacks": self.callbacks,
            "seconds": round(self.seconds, 3),
            "failed": self.failed,
            "rejected_lines": [{"line": r.line_number, "reason": r.reason} for r in self.rejected],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        summary = self.summary
        yield f"{self.name}: {self.status} after {self.seconds:.1f} s (batch {self.batch_id})"
        failed = f", {self.failed} failed" if self.failed else ""
        yield (
            f"{summary.total} documents: {summary.stored} stored, {summary.invalid} invalid, "
            f"{summary.crashed} crashed{failed}"
        )
        for child, members in groupby(self.crashed, key=lambda document: document.child):
            crashed = list(members)
            signal, frame = crashed[0].signal or "no signal known", crashed[0].frame
            where = f" in {frame}" if frame else ""
            yield f"  crashed: child {child} by {signal}{where}, with " + ", ".join(map(str, crashed))
        for line in self.rejected[:SHOWN_LINES]:
            yield f"  invalid: line {line.line_number}: {line.reason}"
        for row in self.invalid:
            name = ":".join(part for part in (row["sourcedb"], row["sourceid"], row["divid"]) if part)
            yield f"  invalid: {name}: {row['problem']}"
        unnamed = summary.invalid - len(self.rejected[:SHOWN_LINES]) - len(self.invalid)
        if unnamed > 0:
            yield f"  invalid: and {unnamed} more"
        yield f"The summary's callback was started {self.callbacks} time{'' if self.callbacks == 1 else 's'}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    try:
        options = parse_arguments(arguments)
    except SystemExit as error:  # argparse has printed what is wrong
        return error.code if isinstance(error.code, int) else EXIT_USAGE
    return run(options)


def run(options: Options) -> int:
    """Uploads, prints and writes the report; every foreseen failure is a message on stderr."""
    from celery_batchtrack import errors

    try:
        report = upload(options)
    except (documents.UnreadableInput, UnusableBroker, errors.ImproperlyConfigured) as error:
        return _complain(error, EXIT_USAGE)
    except (store.OutputUnavailable, errors.DatabaseUnavailable, errors.SchemaError) as error:
        return _complain(error, EXIT_UNAVAILABLE)
    except BrokerError as error:
        problem = f"the broker cannot be reached: {error}. Start it, or leave --broker out."
        return _complain(problem, EXIT_NOT_ENDED)
    except (CannotEnd, errors.BatchTrackError) as error:
        return _complain(error, EXIT_NOT_ENDED)
    except KeyboardInterrupt:
        return _complain("interrupted; the batch has been cancelled", EXIT_NOT_ENDED)
    print(report)
    if not report.summary.total:
        print(f"annotations: there is no document in {options.input}", file=sys.stderr)
    if options.report:
        try:
            options.report.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            return _complain(
                f"the report cannot be written to {options.report}: {error.strerror}", EXIT_USAGE
            )
    return EXIT_SETTLED


def parse_arguments(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line. Raises SystemExit, as argparse does."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        output = store.output_url(given.output)
        report = _writable(given.json) if given.json else None
    except ValueError as error:
        parser.error(str(error))
    return Options(
        input=given.input,
        batch_size=given.batch_size,
        concurrency=given.concurrency,
        output=output,
        database=given.database or default_tracking_database(output),
        broker=given.broker,
        report=report,
        timeout=given.timeout,
        on_crash=given.on_crash,
    )


def default_tracking_database(output: str) -> str:
    """``batchtrack.db`` beside the output when that is a file, else in the working folder."""
    url = sa.make_url(output)
    folder = Path(url.database).parent if url.get_backend_name() == "sqlite" and url.database else Path.cwd()
    return f"sqlite:///{folder / 'batchtrack.db'}"


def upload(options: Options) -> Report:
    """Uploads the documents of a file and waits for the end of it."""
    from celery_batchtrack import BatchTrack, LocalCluster
    from examples.annotations import tasks

    documents.check_readable(options.input)
    store.create_tables(options.output)
    with ExitStack() as stack:
        tasks.configure(options.broker or _temporary_broker(stack), options.database)
        _check_broker(tasks.app)
        BatchTrack.of(tasks.app).migrate()
        print(f"tracking database: {_shown(options.database)}", flush=True)
        stack.enter_context(LocalCluster(tasks.app, processes=options.concurrency))
        started = time.monotonic()
        upload_id = str(uuid.uuid4())
        batch, rejected = _send(options, upload_id)
        _await_end(batch, options.timeout)
        return _report(options, batch, upload_id, rejected, time.monotonic() - started)


def _send(options: Options, upload_id: str) -> tuple[Batch, list[documents.RejectedLine]]:
    from celery_batchtrack import Batch
    from examples.annotations.tasks import message, store_documents, summarise

    name = options.input.name
    rejected: list[documents.RejectedLine] = []
    on_finish = summarise.s(options.output, upload_id)
    with Batch(f"upload {name}", tolerance="100%", on_finish=on_finish, on_crash=options.on_crash) as batch:
        references = documents.read(options.input, rejected.append)
        for part in documents.batches(references, options.batch_size):
            docs = [message(reference) for reference in part]
            batch.add(store_documents.s(docs, options.output, upload_id))
        store.open_upload(options.output, str(batch.id), upload_id, name, len(rejected))
    return batch, rejected


def _await_end(batch: Batch, timeout: float | None) -> None:
    """Shows progress until all children are settled and the callback is over."""
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        if sys.stderr.isatty():
            batch.wait(timeout=timeout, bar=True)
        else:
            _print_progress(batch, deadline)
        _await_callback(batch)
    except KeyboardInterrupt:
        batch.cancel()
        raise


def _print_progress(batch: Batch, deadline: float | None) -> None:
    shown = ""
    for progress in batch.iter_progress(every=0.5):
        rate = f", {progress.rate:.0f} documents/s" if progress.rate else ""
        line = (
            f"{progress.percent:3d} %  {progress.items_completed} of {progress.items_total} documents done, "
            f"{progress.items_failed} failed, {progress.items_crashed} crashed"
        )
        if line != shown:
            print(line + rate, file=sys.stderr, flush=True)
            shown = line
        if deadline is not None and time.monotonic() > deadline and progress.percent < 100:
            raise CannotEnd(f"batch {batch.id} had not ended in time; its rows say what is still open")


def _await_callback(batch: Batch) -> None:
    deadline = time.monotonic() + CALLBACK_TIMEOUT
    while any(callback.status in ("pending", "running") for callback in batch.children(kind="callbacks")):
        if time.monotonic() > deadline:
            raise CannotEnd(f"all children of batch {batch.id} are settled, but its summary was not written")
        time.sleep(0.05)


def _report(
    options: Options, batch: Batch, upload_id: str, rejected: list[documents.RejectedLine], seconds: float
) -> Report:
    from examples.annotations import outcome

    progress = batch.progress()
    if progress.pending or progress.running:
        raise CannotEnd(f"batch {batch.id} is {batch.status} with children that are not settled")
    summary = outcome.summarise(batch, options.output, upload_id)
    return Report(
        name=f"upload {options.input.name}",
        batch_id=str(batch.id),
        status=str(batch.status),
        summary=store.Summary(
            total=summary.total + len(rejected),
            stored=summary.stored,
            invalid=summary.invalid + len(rejected),
            crashed=summary.crashed,
        ),
        failed=progress.items_failed + progress.items_cancelled,
        crashed=list(outcome.crashed_documents(batch, options.output, upload_id)),
        callbacks=outcome.callback_starts(batch),
        seconds=seconds,
        rejected=rejected,
        invalid=[dict(row) for row in store.invalid_documents(options.output, upload_id, SHOWN_LINES)],
    )


def _temporary_broker(stack: ExitStack) -> str:
    from examples.annotations.tasks import embedded_broker_url

    folder = stack.enter_context(
        tempfile.TemporaryDirectory(prefix="annotations-broker-", ignore_cleanup_errors=True)
    )
    return embedded_broker_url(Path(folder))


def _check_broker(app: Any) -> None:
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=2, interval_start=0.2, timeout=10)
    except (KeyError, ImportError) as error:
        raise UnusableBroker(f"kombu has no transport for this --broker: {error.args[0]}") from error
    except ImproperlyConfigured as error:
        raise UnusableBroker(str(error)) from error
    except app.connection_for_write().connection_errors as error:
        raise UnusableBroker(f"the broker refuses us: {error}. Check --broker, its user and password.") from error


def _shown(url: str) -> str:
    return sa.make_url(url).render_as_string(hide_password=True)


def _complain(problem: object, status: int) -> int:
    print(f"annotations: {problem}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.annotations",
        description="Upload a JSONL file of annotated documents: each is validated and stored.",
    )
    add = parser.add_argument
    add("input", metavar="INPUT.jsonl", type=Path, help="one annotated document a line")
    add("--batch-size", type=_positive, default=25, metavar="N", help="documents in one task (default: 25)")
    add("--concurrency", type=_positive, default=2, metavar="N", help="worker processes (default: 2)")
    add("--output", default="annotations.db", metavar="DB",
        help="where documents are stored: an SQLite file or a URL (default: annotations.db)")  # fmt: skip
    add("--database", type=_database_url, metavar="URL",
        help="the tracking database (default: the SQLite file batchtrack.db beside the output)")  # fmt: skip
    add("--broker", metavar="URL", help="Celery's broker (default: the embedded one, in a temporary folder)")
    add("--on-crash", choices=ON_CRASH, default="skip",
        help="what becomes of a task's documents when its process dies "
             "(default: skip, the killer alone is crashed)")  # fmt: skip
    add("--json", type=Path, metavar="REPORT", help="write the report to this file")
    add("--timeout", type=_seconds, metavar="SECONDS", help="stop waiting after this long (default: never)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return number


def _database_url(text: str) -> str:
    try:
        return store.output_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _writable(path: Path) -> Path:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"the report cannot be written to {path}: give a file in a folder that exists")
    return path.absolute()
