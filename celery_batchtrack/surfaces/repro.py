"""`batchtrack repro`: a child's arguments, and a script that runs its task outside Celery."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery_batchtrack import errors
from celery_batchtrack.surfaces.pages import how_it_died, moment, short, some
from celery_batchtrack.surfaces.render import size
from celery_batchtrack.vocabulary.crash_policy import RowPolicy
from celery_batchtrack.vocabulary.evidence import IncidentRow
from celery_batchtrack.vocabulary.ids import name_of_index
from celery_batchtrack.vocabulary.states import Cause, Kind

if TYPE_CHECKING:
    from celery_batchtrack.glue.extension import BatchTrack
    from celery_batchtrack.vocabulary.records import ChildRow

ARGUMENTS, SCRIPT = "arguments.json", "repro.py"
#: First line of every script written here: no other file is overwritten.
MARK = '"""Runs one tracked task outside Celery. Written by `batchtrack repro`.'
#: Where an application may be told its configuration from outside.
_TOLD_BY = ("DJANGO_SETTINGS_MODULE", "CELERY_CONFIG_MODULE", "CELERY_LOADER")


class Unrepeatable(Exception):
    """There are no arguments to write; the text says why."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call, as JSON, and in words what they are."""

    text: str
    what: str
    item: str | None = None
    item_index: int | None = None


# -- arguments --------------------------------------------------------------------------------------


def call_of(extension: BatchTrack, row: ChildRow, incident: IncidentRow | None, *, whole: bool) -> Call:
    """The arguments of a row that still has them: those of its item in hand, or with `whole` of all its items."""
    if row.kind != Kind.CHILD:
        return _callback(extension, row)
    assert row.signature is not None
    if row.item_count > 1 and not whole:
        return _reduced(extension, row, incident)
    if len(row.items) == 1:
        return Call(_pretty(row.signature), f"its only item: {short(row.items[0])}", row.items[0])
    return Call(_pretty(row.signature), f"all {row.item_count} items" if row.items else "as they were")


def _reduced(extension: BatchTrack, row: ChildRow, incident: IncidentRow | None) -> Call:
    assert row.signature is not None
    whole = f"all {row.item_count} items, for "
    if incident is None or incident.item_index is None:
        return Call(_pretty(row.signature), whole + "the item in hand is not known")
    from celery_batchtrack.behaviour.handover import items_of
    from celery_batchtrack.glue import codec

    items = items_of(row, _path(extension, row), codec)
    if items is None or not 0 <= incident.item_index < len(items.values):
        named = short(incident.item or name_of_index(incident.item_index))
        return Call(_pretty(row.signature), whole + f"they are no list that can be cut (item in hand: {named})")
    (name,), text = items.chosen([incident.item_index], codec)
    what = f"only item {short(name)}, which was in hand: number {incident.item_index + 1} of {row.item_count}"
    return Call(_pretty(text), what, name, incident.item_index)


def _path(extension: BatchTrack, row: ChildRow) -> tuple[str | int, ...] | None:
    """Where the items are: as the row says, or as the task declares it now."""
    from celery_batchtrack.glue import declare, signatures

    kept = RowPolicy.from_option(row.policy).items
    if kept is not None:
        return kept
    call = signatures.parsed(row.signature)
    return declare.items_path(extension.app.tasks[row.task], call.get("args") or (), call.get("kwargs") or {})


def _callback(extension: BatchTrack, row: ChildRow) -> Call:
    """A callback's own arguments, behind those that its batch gives it."""
    from celery_batchtrack.behaviour import dispatch
    from celery_batchtrack.behaviour.tracker import declared_callback
    from celery_batchtrack.glue import codec, publish
    from celery_batchtrack.vocabulary.records import Outgoing

    batch = extension.store.batch(row.batch_id)
    if batch is None:
        raise Unrepeatable(f"batch {row.batch_id} is gone")
    declared = declared_callback(batch, row)
    if declared.get("errback") is not None and not declared.get("immutable"):
        raise Unrepeatable(f"#{row.position} is an errback of Celery's: it is given an exception, which no file holds")
    try:
        args, kwargs, _ = publish.call_of(dispatch.message_of(extension.tracker, Outgoing(row, batch)))
        text = codec.dumps({"args": args, "kwargs": kwargs})
    except (ValueError, TypeError, LookupError) as error:
        raise Unrepeatable(f"what the batch gives to {row.kind} #{row.position} cannot be made: {error}") from error
    return Call(_pretty(text), f"what the batch gives to its {row.kind} now")


def _pretty(signature: str) -> str:
    """For people, who may reduce it further: what kombu's JSON marks as a date stays marked."""
    call = json.loads(signature)
    return json.dumps({"args": call.get("args") or [], "kwargs": call.get("kwargs") or {}}, indent=2) + "\n"


# -- folder -----------------------------------------------------------------------------------------


def write(folder: Path, app: str, row: ChildRow, incident: IncidentRow | None, call: Call) -> Path:
    """Both files; returns the script's path. Raises FileExistsError rather than overwrite somebody's own file."""
    script = folder / SCRIPT
    ours = script.exists() and script.read_text("utf-8", "replace").startswith(MARK)
    for file in (script, folder / ARGUMENTS):
        if file.exists() and not ours:
            raise FileExistsError(f"{file} is there already, and was not written by this command")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # arguments may be customers' data
    (folder / ARGUMENTS).write_text(call.text, "utf-8")
    script.write_text(script_for(app, row, incident, call), "utf-8")
    return script


def command_for(script: Path) -> str:
    return shlex.join([sys.executable, str(script)])


def script_for(app: str, row: ChildRow, incident: IncidentRow | None, call: Call) -> str:
    about = [f"#{row.position} of batch {row.batch_id}", f"arguments: {call.what}"]
    if incident is not None:
        about.append(_story(incident))
    told = {name: os.environ[name] for name in _TOLD_BY if name in os.environ}
    values = {
        "APPLICATION": app, "TASK": row.task, "FOLDER": str(Path.cwd()), "PATHS": _own_paths(), "ENVIRONMENT": told,
        "ABOUT": [short(line, 300) for line in about],
    }  # fmt: skip
    return _TEMPLATE.replace("<MARK>", MARK).replace("<VALUES>", "\n".join(f"{k} = {v!a}" for k, v in values.items()))


def _story(incident: IncidentRow) -> str:
    one = {name: getattr(incident, name) for name in ("signal", "exit_code", "cause")}
    at = f" at {incident.python_frame}" if incident.python_frame else ""
    where = f" on {incident.hostname}" if incident.hostname else ""
    when = moment(incident.died_at or incident.detected_at)
    item = f", item in hand: {incident.item or some(incident.items)}" if incident.items or incident.item else ""
    return f"attempt {incident.attempt}: {how_it_died(one)}{at}{where}, {when}{item}"


def _own_paths() -> list[str]:
    """Entries of the import path that a fresh interpreter does not have by itself."""
    usual = {os.path.realpath(each) for each in sysconfig.get_paths().values()}
    usual.add(os.path.realpath(Path(sysconfig.get_path("stdlib")) / "lib-dynload"))
    folders = [str(Path(each).absolute()) for each in sys.path if each and Path(each).is_dir()]
    return [each for each in dict.fromkeys(folders) if os.path.realpath(each) not in usual]


_TEMPLATE = '''\
<MARK>

No worker, no broker, no tracking. The arguments are in arguments.json: reduce them as you like.
Its exit status is that of the death: after SIGSEGV a shell shows 139, and subprocess -11.
Ctrl-\\\\ ends it with its Python stack.
"""

import faulthandler
import os
import signal
import sys
from pathlib import Path

<VALUES>


def main():
    faulthandler.enable()  # at once: importing the application may be what kills
    if hasattr(signal, "SIGQUIT"):
        faulthandler.register(signal.SIGQUIT, chain=True)
    sys.stdout.reconfigure(errors="backslashreplace")
    here = Path(__file__).resolve().parent
    find_modules(here)
    task = find_task()
    call = decoded((here / "arguments.json").read_text("utf-8"))
    args, kwargs = call["args"], call["kwargs"]
    print(f"{TASK} in process {os.getpid()}", *ABOUT, sep="\\n  ", flush=True)
    print(f"calling it with {args!r:.300} {kwargs!r:.300}", flush=True)
    faulthandler.enable()  # again: the application may have switched it off
    result = task(*args, **kwargs)
    print(f"it did not die, and returned {result!r:.300}", flush=True)


def find_modules(here):
    """Import what `celery -A` imported, from wherever this is run."""
    if sys.path and Path(sys.path[0]).resolve() == here:
        del sys.path[0]
    sys.path[:0] = [each for each in dict.fromkeys([FOLDER, *PATHS]) if each not in sys.path]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        os.chdir(FOLDER)
    except OSError as error:
        print(f"not run in the application's folder: {error}", file=sys.stderr, flush=True)


def find_task():
    import logging

    from celery.app.utils import find_app

    app = find_app(APPLICATION)
    app.set_current()
    app.loader.import_default_modules()
    app.finalize()
    logging.basicConfig(level=logging.INFO)
    if TASK not in app.tasks:
        sys.exit(f"{APPLICATION} has no task {TASK}")
    return app.tasks[TASK]


def decoded(text):
    from kombu.utils import json

    return json.loads(text)


if __name__ == "__main__":
    main()
'''


# -- running it -------------------------------------------------------------------------------------


def run(script: Path, *, output: int | None = None) -> int:
    """Run the script; its exit code, minus the number of the signal that killed it. `output`: where it prints to."""
    quit_ = getattr(signal, "SIGQUIT", None)  # by Ctrl-\, for the script alone
    before = signal.signal(quit_, lambda *_: None) if quit_ is not None else None
    try:
        return subprocess.run([sys.executable, str(script)], stdout=output, check=False).returncode
    finally:
        if quit_ is not None:
            signal.signal(quit_, before)


def how_it_ended(code: int) -> str:
    """``died of SIGSEGV``, ``ended with exit code 3``, ``did not die``."""
    if code < 0:
        try:
            return f"died of {signal.Signals(-code).name}"
        except ValueError:
            return f"died of signal {-code}"
    return f"ended with exit code {code}" if code else "did not die"


def compared(code: int, incident: IncidentRow | None) -> str:
    """How the run ended, and whether that is how the child did."""
    ended = how_it_ended(code)
    if incident is None:
        return ended
    if incident.detected_by is None:  # it did not die, it failed
        return f"{ended}; in the batch: {incident.exception or incident.cause}"
    then = how_it_died({name: getattr(incident, name) for name in ("signal", "exit_code", "cause")})
    same = then in (ended.removeprefix("died of "), ended.removeprefix("ended with "))
    return f"{ended}, as it did in the batch" if same else f"{ended}; in the batch: {then}"


def incident_of(incidents: Sequence[IncidentRow]) -> IncidentRow | None:
    """Of one child's incidents (oldest first) the one to reproduce: the newest death that knows its item, else the
    newest death; where nothing died, the newest failure."""
    standing = [each for each in incidents if each.overturned_at is None]
    deaths = [each for each in standing if each.detected_by is not None]
    known = [each for each in deaths if each.item_index is not None]
    return next((found[-1] for found in (known, deaths, standing) if found), None)


def caution(incident: IncidentRow | None) -> str | None:
    """What to mind before it is run again, from how it died."""
    cause = None if incident is None else incident.cause
    if incident is not None and cause == Cause.OOM:
        peak = f" (it had {size(incident.peak_memory)})" if incident.peak_memory else ""
        return f"it died of memory{peak}: run it where that harms nobody"
    if cause in (Cause.TIME_LIMIT, Cause.SOFT_TIME_LIMIT, Cause.STALLED):
        return "it was ended by a time-out, which the script does not have: Ctrl-\\ ends it and shows where it is"
    return None


def as_mapping(row: ChildRow, script: Path, call: Call, incident: IncidentRow | None) -> dict[str, Any]:
    folder = script.parent
    return {
        "batch_id": row.batch_id, "position": row.position, "task": row.task, "folder": str(folder),
        "arguments": str(folder / ARGUMENTS), "script": str(script), "command": command_for(script),
        "what": call.what, "item": call.item, "item_index": call.item_index, "caution": caution(incident),
        "returncode": None, "ended": None,
    }  # fmt: skip


def check_task(extension: BatchTrack, app: str, row: ChildRow) -> None:
    """The script must find the task. Raises ImproperlyConfigured."""
    if row.task not in extension.app.tasks:
        raise errors.ImproperlyConfigured(
            f"{row.task} is no task of {app}: name the application that has it (celery -A <app> batchtrack repro …)"
        )
