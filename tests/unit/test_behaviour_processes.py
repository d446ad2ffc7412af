"""Black boxes, spools and processes of this host: what the living may learn of the dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from celery_batchtrack.behaviour import blackbox, folders, hosts, spool
from celery_batchtrack.behaviour.blackbox import InHand, Page, PageState, Phase
from celery_batchtrack.behaviour.folders import Boxes
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import Ending
from celery_batchtrack.vocabulary.states import Cause, Status
from tests.helpers import ROOT, eventually

KEY, TOKEN = ChildKey(uuid7(), 7), new_token()


@contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that prints a line when it is ready, and lives until its input ends."""
    script = f"import sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        process.kill()


# -- pages -----------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    page = Page(tmp_path / "1-1-1-0.box")
    yield page
    page.close()


def _read(page: Page) -> PageState | None:
    assert page.path is not None
    return blackbox.read(page.path)


def fresh(phase: Phase, state: PageState | None) -> PageState:
    """What a page says of a run that has said nothing of its items; memory and progress are taken from `state`."""
    assert state is not None and state.peak_memory > 1_000_000
    said = PageState(phase, KEY, TOKEN, 0.0, threading.get_ident(), item=InHand(None, 0, None, False, False))
    return replace(said, peak_memory=state.peak_memory, progress=state.progress)


def test_a_fresh_page_is_idle(page: Page) -> None:
    assert _read(page) == PageState(Phase.IDLE, None, None)


def test_a_page_names_its_run_through_all_its_phases(page: Page) -> None:
    page.enter(KEY, TOKEN)
    assert _read(page) == fresh(Phase.CLAIMING, _read(page))
    for phase in (Phase.RUNNING, Phase.SETTLING):
        page.phase(phase)
        assert _read(page) == fresh(phase, page.state())
    page.clear()
    assert _read(page) == PageState(Phase.IDLE, None, None)


def test_a_claim_that_was_given_up_is_seen_and_remembered(page: Page) -> None:
    page.enter(KEY, TOKEN)
    page.give_up(TOKEN)
    assert _read(page) == fresh(Phase.GAVE_UP, page.state())
    page.enter(ChildKey(uuid7(), 1), new_token())
    assert page.given_up == {TOKEN}


def test_a_write_that_was_torn_by_a_death_is_recognised(page: Page) -> None:
    """The sequence number is odd while a write is under way."""
    page.enter(KEY, TOKEN)
    assert page.path is not None
    data = bytearray(page.path.read_bytes())
    data[8] |= 1
    page.path.write_bytes(data)
    assert _read(page) is None


@pytest.mark.parametrize("content", [b"", b"BTK2", b"BTK2" + bytes(20), b"BTK1" + bytes(4092), b"XXXX" + bytes(4092)])
def test_what_is_no_page_says_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.box"
    path.write_bytes(content)
    assert blackbox.read(path) is None
    assert blackbox.read(tmp_path / "missing.box") is None


def test_a_page_read_while_it_is_written_is_never_a_mixture(page: Page) -> None:
    runs = {ChildKey(uuid.UUID(int=n), n): uuid.UUID(int=n) for n in range(1, 50)}
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for key, token in runs.items():
                page.enter(key, token)

    writer = threading.Thread(target=write)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # or each system call of the reader waits for the writer to let go
    writer.start()
    try:
        seen = [state for _ in range(2000) if (state := _read(page)) is not None and state.key is not None]
    finally:
        stop.set()
        writer.join()
        sys.setswitchinterval(interval)
    assert seen and all(runs[state.key] == state.token for state in seen if state.key)


def test_the_kernel_keeps_the_page_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "page.box"
    code = f"""
import uuid
from pathlib import Path
from celery_batchtrack.behaviour.blackbox import Page, Phase
from celery_batchtrack.vocabulary.ids import ChildKey
page = Page(Path({str(path)!r}))
page.enter(ChildKey(uuid.UUID({str(KEY.batch_id)!r}), 7), uuid.UUID({str(TOKEN)!r}), Phase.RUNNING)
"""
    with another_process(code) as process:
        assert folders.held(path) is True
        process.send_signal(signal.SIGSEGV)
        process.wait()
        state = blackbox.read(path)
        assert state is not None and (state.phase, state.key, state.token) == (Phase.RUNNING, KEY, TOKEN)
        assert state.thread and state.peak_memory > 1_000_000
        assert folders.held(path) is False


def test_nothing_is_known_of_a_lock_whose_file_is_not_there(tmp_path: Path) -> None:
    assert folders.held(tmp_path / "missing") is None


def test_a_page_without_a_file_does_nothing() -> None:
    page = Page(None)
    page.enter(KEY, TOKEN)
    page.phase(Phase.RUNNING)
    page.clear()
    page.close()


# -- folders ---------------------------------------------------------------------------------------


def test_the_folder_that_was_asked_for_is_made_private(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b"
    assert folders.choose_folder(str(wanted)) == wanted
    assert wanted.stat().st_mode & 0o077 == 0


def test_no_other_folder_is_taken_where_the_one_asked_for_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert folders.choose_folder(str(tmp_path / "file" / "x")) is None


def test_by_default_the_first_writable_place_of_this_user_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = folders.choose_folder(None)
    assert found is not None and found.name == f"batchtrack-{os.getuid()}"
    real = Path.mkdir

    def mkdir(path: Path, *args: object, **kwargs: object) -> None:
        if path.is_relative_to(f"/dev/shm/batchtrack-{os.getuid()}"):
            raise PermissionError(path)
        real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert folders.choose_folder(None) == tmp_path / f"batchtrack-{os.getuid()}"


def test_pages_of_all_processes_are_found_by_slot(tmp_path: Path) -> None:
    boxes = Boxes(tmp_path, uuid.uuid4())
    boxes.create()
    boxes.page("12:34:56:0").enter(KEY, TOKEN)
    boxes.page("12:34:56:1")
    assert [slot for slot, _ in boxes.pages()] == ["12:34:56:0", "12:34:56:1"]
    assert boxes.page("12:34:56:0") is boxes.page("12:34:56:0")
    boxes.drop("12:34:56:1")
    assert [slot for slot, _ in boxes.pages()] == ["12:34:56:0"]
    boxes.close_own_pages()
    assert list(boxes.pages()) == []


def test_a_slot_names_process_thread_and_depth() -> None:
    pid, start, thread, depth = blackbox.slot_name(2).split(":")
    assert (int(pid), int(depth)) == (os.getpid(), 2)
    assert blackbox.slot_process(blackbox.slot_name()) == (os.getpid(), hosts.started(os.getpid()))
    others: list[str] = []
    thread_ = threading.Thread(target=lambda: others.append(blackbox.slot_name(2)))
    thread_.start()
    thread_.join()
    assert others[0].split(":")[2] != thread and others[0].split(":")[:2] == [pid, start]


def test_a_worker_without_a_folder_works_without_boxes() -> None:
    boxes = Boxes(None, uuid.uuid4())
    boxes.create()
    boxes.page("1:1:1:0").enter(KEY, TOKEN)
    assert list(boxes.pages()) == []
    boxes.remove()


def test_a_clean_end_removes_the_folder_unless_an_end_is_still_undelivered(tmp_path: Path) -> None:
    clean, owing = Boxes(tmp_path, uuid.uuid4()), Boxes(tmp_path, uuid.uuid4())
    for boxes in (clean, owing):
        boxes.create()
    assert owing.folder is not None
    spool.write(owing.folder, _spooled())
    assert folders.with_spool(tmp_path) == {owing.worker_id}
    clean.remove()
    owing.remove()
    assert [path.name for path in tmp_path.iterdir()] == [str(owing.worker_id)]


# -- spool -----------------------------------------------------------------------------------------


def _spooled(**more: object) -> spool.Spooled:
    evidence = Evidence(Cause.EXCEPTION, message="naïve\n\0", traceback="Traceback …", hostname="h", worker="w", pid=4)
    ending = Ending(Status.FAILED, None, Cause.EXCEPTION, evidence)
    return spool.Spooled(KEY, new_token(), "1:1:1:0", more.get("ending", ending))  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spool").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    "ending",
    [
        Ending(Status.COMPLETED, '{"é": [1, null]}'),
        Ending(Status.COMPLETED, None, keep_signature=True),
        Ending(Status.CANCELLED, None, Cause.IGNORED),
        _spooled().ending,
    ],
)
def test_an_end_survives_on_disk(folder: Path, ending: Ending) -> None:
    written = _spooled(ending=ending)
    path = spool.write(folder, written)
    assert list(spool.read_all(folder)) == [(path, written)]
    assert [each.name for each in (folder / "spool").iterdir()] == [f"{written.token}.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"batch": "x"}', '{"batch": 5}'])
def test_a_broken_file_is_set_aside_and_the_others_are_read(folder: Path, content: str) -> None:
    good = _spooled()
    spool.write(folder, good)
    (folder / "spool" / "0000.json").write_text(content)
    assert [each for _, each in spool.read_all(folder)] == [good]
    assert (folder / "spool" / "0000.broken").exists()


def test_a_half_written_file_is_not_read(folder: Path) -> None:
    (folder / "spool" / f"{uuid.uuid4()}.tmp").write_text('{"batch":')
    assert list(spool.read_all(folder)) == []
    assert list(spool.read_all(folder / "missing")) == []


# -- processes -------------------------------------------------------------------------------------


def test_this_process_is_there_and_known_by_its_start() -> None:
    start = hosts.started(os.getpid())
    assert start is not None
    assert hosts.gone(os.getpid(), start) is False
    assert hosts.gone(os.getpid(), start - 1) is True, "the pid came again"


def test_without_a_start_time_a_living_pid_proves_nothing() -> None:
    assert hosts.gone(os.getpid(), None) is None


def test_a_dead_process_is_gone() -> None:
    with another_process("") as process:
        start = hosts.started(process.pid)
        assert hosts.gone(process.pid, start) is False
    assert hosts.gone(process.pid, start) is True
    assert hosts.gone(process.pid, None) is True
    assert hosts.started(process.pid) is None


def test_a_zombie_is_gone() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    try:
        start = eventually(lambda: hosts.started(pid), what="its start time")
        eventually(lambda: hosts.gone(pid, start) is True, what="the zombie taken for gone")
    finally:
        os.waitpid(pid, 0)


def test_a_process_with_an_odd_name_is_read_all_the_same(tmp_path: Path) -> None:
    odd = tmp_path / "a ) S 1 (b"
    odd.write_text("#!/bin/sh\nread line\n")
    odd.chmod(0o755)
    with subprocess.Popen([str(odd)], stdin=subprocess.PIPE) as process:
        start = hosts.started(process.pid)
        assert start is not None and abs(start - (hosts.started(os.getpid()) or 0)) < 10**7
        assert hosts.gone(process.pid, start) is False


def test_a_host_is_known_by_boot_and_namespace() -> None:
    host = hosts.identity()
    assert host == hosts.identity()
    assert host.boot_id and host.pid_namespace and host.hostname


def test_whether_a_process_listens_to_a_signal_is_known() -> None:
    """One that does not would be ended by it."""
    code = f"import faulthandler, signal; faulthandler.register({signal.SIGUSR2:d}, file=sys.stderr)"
    with another_process(code) as process:
        assert hosts.catches(process.pid, signal.SIGUSR2) is True
        assert hosts.catches(process.pid, signal.SIGUSR1) is False
        assert hosts.catches(process.pid, signal.SIGRTMAX - 5) is False
    assert hosts.catches(process.pid, signal.SIGUSR2) is False
