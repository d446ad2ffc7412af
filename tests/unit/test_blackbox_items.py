"""Items and notes in the black box: what a page says of the item in hand, and what it must never say."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from celery_batchtrack.behaviour import blackbox, dispatch, folders, hosts
from celery_batchtrack.behaviour.blackbox import DECLARED, PROMISED, InHand, Page, PageState, Phase
from celery_batchtrack.behaviour.folders import Boxes
from celery_batchtrack.behaviour.run import Runner
from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary import events
from celery_batchtrack.vocabulary.ids import ChildKey, new_token, uuid7
from celery_batchtrack.vocabulary.records import Ending
from celery_batchtrack.vocabulary.states import Status
from tests.helpers import eventually
from tests.store.behaviour_kit import Bench, Told, killed, tracker_on
from tests.store.kit import Scene

KEY, TOKEN = ChildKey(uuid7(), 7), new_token()
ITEM_SEQUENCE, NOTE_SEQUENCE = 128, 1536


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "1-1-1-0.box"


@pytest.fixture
def page(path: Path) -> Iterator[Page]:
    page = Page(path)
    page.enter(KEY, TOKEN, Phase.RUNNING)
    yield page
    page.close()


def writer(page: Page, flags: int = 0) -> Callable[[int, bytes], None]:
    write = page.item_writer(flags)
    assert write is not None
    return write


def said(path: Path) -> PageState:
    state = blackbox.read(path)
    assert state is not None
    return state


# -- round trip ------------------------------------------------------------------------------------


def test_a_run_that_has_said_nothing_has_no_item_and_no_note(page: Page, path: Path) -> None:
    assert (said(path).item, said(path).note) == (InHand(None, 0, None, False, False), None)


@pytest.mark.parametrize(
    ("flags", "declared", "promised"),
    [(0, False, False), (DECLARED, True, False), (PROMISED, False, True), (DECLARED | PROMISED, True, True)],
)
def test_the_item_in_hand_is_read_as_it_was_written(
    page: Page, path: Path, flags: int, declared: bool, promised: bool
) -> None:
    write = writer(page, flags)
    for index, name in enumerate(("PMC:1", "naïve", "", "x" * 255)):
        write(index, name.encode())
        assert said(path).item == page_item(page) == InHand(index, index, name or None, declared, promised)
    page.no_item(4, flags)
    assert said(path).item == InHand(None, 4, None, declared, promised)


def page_item(page: Page) -> InHand | None:
    state = page.state()
    return None if state is None else state.item


def test_an_identifier_of_255_characters_fits_whatever_they_are(page: Page, path: Path) -> None:
    name = "\U0001f9ec" * 255
    writer(page)(2**40, name.encode())
    assert said(path).item == InHand(2**40, 2**40, name, False, False)


def test_a_shorter_identifier_does_not_show_the_end_of_a_longer_one(page: Page, path: Path) -> None:
    write = writer(page)
    write(0, b"a long one")
    write(1, b"short")
    item = said(path).item
    assert item is not None and item.identifier == "short"


def test_the_last_note_is_kept_and_only_its_first_512_bytes(page: Page, path: Path) -> None:
    for note in ("parse", "é" * 256, "tokenise\n\ttab", "x"):
        page.note(note)
        assert said(path).note == note
    page.note("é" * 300)
    assert said(path).note == "é" * 256
    page.note("x" + "é" * 300)
    assert said(path).note == "x" + "é" * 255, "a character that is cut in two is left out"
    page.note("a" + "\udcff" * 3)
    assert said(path).note == "a???", "lone surrogates are no text"


def test_item_and_note_do_not_disturb_each_other_or_the_run(page: Page, path: Path) -> None:
    write = writer(page, DECLARED)
    write(3, b"doc-3")
    page.note("x" * 512)
    write(4, b"d" * 1020)
    page.phase(Phase.SETTLING)
    state = said(path)
    assert (state.phase, state.key, state.token) == (Phase.SETTLING, KEY, TOKEN)
    assert state.item == InHand(4, 4, "d" * 1020, True, False) and state.note == "x" * 512


def test_the_run_says_its_stall_time_out_its_thread_and_its_memory(page: Page, path: Path) -> None:
    page.enter(KEY, TOKEN, Phase.RUNNING, stall_timeout=2.5)
    state = said(path)
    assert (state.stall_timeout, state.thread) == (2.5, threading.get_ident())
    assert state.peak_memory > 1_000_000


def test_every_item_note_and_touch_is_progress_and_a_phase_is_none(page: Page, path: Path) -> None:
    write = writer(page)
    seen = [said(path).progress]
    steps: list[Callable[[], object]] = [
        lambda: write(0, b"a"), lambda: write(0, b"a"), lambda: page.note("n"), lambda: page.note("n"), page.touch,
        page.touch, lambda: page.no_item(1, 0),
    ]  # fmt: skip
    for step in steps:
        step()
        seen.append(said(path).progress)
    assert seen == sorted(set(seen)), "each one moves it on"
    page.phase(Phase.SETTLING)
    assert said(path).progress == seen[-1]


# -- torn writes -----------------------------------------------------------------------------------


def tear(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] |= 1
    path.write_bytes(data)


def test_a_torn_item_is_not_told_and_its_run_is(page: Page, path: Path) -> None:
    writer(page)(5, b"doc-5")
    page.note("kept")
    tear(path, ITEM_SEQUENCE)
    state = said(path)
    assert (state.key, state.item, state.note) == (KEY, None, "kept")


def test_a_torn_note_is_not_told_and_its_run_is(page: Page, path: Path) -> None:
    writer(page)(5, b"doc-5")
    page.note("half")
    tear(path, NOTE_SEQUENCE)
    state = said(path)
    assert (state.key, state.item, state.note) == (KEY, InHand(5, 5, "doc-5", False, False), None)


def test_progress_elsewhere_does_not_make_a_torn_note_whole(page: Page, path: Path) -> None:
    page.note("half")
    tear(path, NOTE_SEQUENCE)
    page.touch()
    assert said(path).note is None


def test_a_process_that_ends_in_the_middle_of_an_item_does_not_make_it_whole(page: Page, path: Path) -> None:
    writer(page)(5, b"doc-5")
    tear(path, ITEM_SEQUENCE)
    page.leave()
    assert said(path).item is None


def test_the_next_item_and_note_mend_torn_ones(page: Page, path: Path) -> None:
    tear(path, ITEM_SEQUENCE)
    tear(path, NOTE_SEQUENCE)
    writer(page)(6, b"doc-6")
    page.note("new")
    assert (said(path).item, said(path).note) == (InHand(6, 6, "doc-6", False, False), "new")


@pytest.mark.parametrize("at", [ITEM_SEQUENCE, NOTE_SEQUENCE])
def test_a_new_run_starts_with_whole_sections_even_after_a_torn_write(page: Page, path: Path, at: int) -> None:
    """A soft time limit may strike between two stores."""
    tear(path, at)
    page.enter(KEY, new_token(), Phase.RUNNING)
    assert (said(path).item, said(path).note) == (InHand(None, 0, None, False, False), None)


def hot_writer(path: Path) -> int:
    """A process that writes items without a pause until it is killed. Its pid."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            page = Page(path)
            page.enter(KEY, TOKEN, Phase.RUNNING)
            write = writer(page)
            names = [(f"{n}:" * (n % 60 + 1)).encode() for n in range(3000)]
            write(0, names[0])
            os.write(told, b"x")
            while True:
                for index, name in enumerate(names):
                    write(index, name)
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    return pid


@pytest.fixture
def hot(path: Path) -> Iterator[int]:
    pid = hot_writer(path)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_reader_beside_a_hot_writer_never_sees_a_mixture_and_always_the_run(hot: int, path: Path) -> None:
    states = [blackbox.read(path) for _ in range(3000)]
    assert all(state is not None and (state.key, state.token) == (KEY, TOKEN) for state in states)
    items = [state.item for state in states if state is not None and state.item is not None]
    assert all(item.identifier == f"{item.index}:" * ((item.index or 0) % 60 + 1) for item in items)
    progress = [state.progress for state in states if state is not None]
    assert progress[0] < progress[-1]


def test_a_process_killed_in_a_hot_loop_leaves_a_whole_item_or_none(path: Path) -> None:
    for _ in range(100):  # one in fifty strikes within a store
        pid = hot_writer(path)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        item = said(path).item
        assert item is None or item.identifier == f"{item.index}:" * ((item.index or 0) % 60 + 1)


# -- runs that follow each other in a slot ---------------------------------------------------------


def test_a_new_run_forgets_the_formers_item_and_note(page: Page, path: Path) -> None:
    writer(page, DECLARED)(9, b"former")
    page.note("former")
    page.enter(ChildKey(KEY.batch_id, 8), new_token(), Phase.RUNNING)
    assert (said(path).item, said(path).note) == (InHand(None, 0, None, False, False), None)


def test_an_idle_page_tells_no_item(page: Page, path: Path) -> None:
    writer(page)(9, b"former")
    page.clear()
    assert said(path) == PageState(Phase.IDLE, None, None)


def test_a_pid_that_came_again_starts_with_an_empty_page(tmp_path: Path, path: Path) -> None:
    """Without start times (a hidden /proc) two processes may use one name."""

    def first() -> None:
        page = Page(path)
        page.enter(KEY, TOKEN, Phase.RUNNING)
        writer(page)(3, b"doc-3")

    killed(first)
    assert said(path).key == KEY
    page = Page(path)
    assert said(path) == PageState(Phase.IDLE, None, None)
    page.close()


def test_a_page_of_a_living_process_is_neither_opened_nor_removed_by_another(tmp_path: Path, page: Page) -> None:
    assert page.path is not None

    def other() -> None:
        with pytest.raises(OSError):
            Page(page.path)

    killed(other)
    assert said(page.path).key == KEY


# -- forks -----------------------------------------------------------------------------------------


def test_a_forked_process_does_not_write_into_its_parents_page(page: Page, path: Path) -> None:
    """The memory is shared: at its end it would report the end of a loop that its parent is still in."""
    write = writer(page)
    write(3, b"doc-3")
    page.note("of the parent")

    def child() -> None:
        page.note("of the child")
        page.no_item(99, 0)
        page.touch()
        page.phase(Phase.SETTLING)
        page.clear()
        assert page.item_writer(0) is None and page.state() is None

    before = said(path)
    killed(child)
    assert said(path) == before


def test_looking_at_its_own_page_does_not_drop_the_lock_that_says_it_lives(page: Page, path: Path) -> None:
    """Closing any descriptor of a file drops the process's locks on it."""
    state = page.state()
    assert state is not None and (state.key, state.token) == (KEY, TOKEN)

    def other() -> None:
        assert folders.held(path) is True

    killed(other)


def test_a_thread_that_outlives_the_page_writes_in_vain(page: Page, path: Path) -> None:
    write = writer(page)
    page.close()
    write(1, b"late")
    page.note("late")
    assert blackbox.read(path) is None


# -- full and unwritable folders -------------------------------------------------------------------


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system without a free block."""
    place = tmp_path / "full"
    place.mkdir()
    if os.getuid() != 0 or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], capture_output=True
    ).returncode:  # fmt: skip
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    with (place / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


@pytest.fixture
def scene(sqlite_url: str) -> Iterator[Scene]:
    scene = Scene(Store(sqlite_url))
    assert scene.store.store_id
    yield scene
    scene.store.dispose()


@pytest.fixture
def tracker(scene: Scene) -> Told:
    return tracker_on(scene.store)


def run_children(scene: Scene, tracker: Told, bench: Bench, count: int) -> None:
    """Each child says what it has in hand, and completes."""
    dispatch.pump(tracker, scene.batch(count))
    sent, tracker.outbox.sent = tracker.outbox.sent, []
    for message in sent:
        run = bench.claim(message)
        run.page.note("a note")
        write = run.page.item_writer(DECLARED)
        if write is not None:
            write(0, b"doc")
        assert bench.runner.settle(run, Ending(Status.COMPLETED, "1")).written


def test_on_a_full_disk_children_complete_and_it_is_said_once(scene: Scene, tracker: Told, full: Path) -> None:
    bench = Bench.of(tracker, full)
    fill(full)
    run_children(scene, tracker, bench, 3)
    (told,) = tracker.of(events.BlackBoxMissing)
    assert told.slot == blackbox.slot_name() and "No space left" in told.error
    page = bench.boxes.page(blackbox.slot_name())
    assert not page.works and page.state() is None
    assert list(bench.boxes.pages()) == [], "no half page is left"


def test_a_page_that_exists_is_written_even_when_the_disk_has_become_full(
    scene: Scene, tracker: Told, full: Path
) -> None:
    bench = Bench.of(tracker, full)
    bench.boxes.page(blackbox.slot_name())
    fill(full)
    run_children(scene, tracker, bench, 2)
    assert tracker.of(events.BlackBoxMissing) == []


def test_a_page_that_cannot_be_allocated_is_none(
    scene: Scene, tracker: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as on a full disk, where nobody may mount one."""

    def no_space(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    bench = Bench.of(tracker, tmp_path / "boxes")
    run_children(scene, tracker, bench, 2)
    assert [event.error for event in tracker.of(events.BlackBoxMissing)] == [
        "OSError: [Errno 28] No space left on device"
    ]
    assert list(bench.boxes.pages()) == []


def test_a_folder_that_was_taken_away_costs_the_box_and_not_the_child(
    scene: Scene, tracker: Told, tmp_path: Path
) -> None:
    bench = Bench.of(tracker, tmp_path / "boxes")
    assert bench.boxes.folder is not None
    for path in (bench.boxes.folder / "spool", bench.boxes.folder):
        for each in path.iterdir():
            if each.is_file():
                each.unlink()
        path.rmdir()
    run_children(scene, tracker, bench, 2)
    assert len(tracker.of(events.BlackBoxMissing)) == 1


def test_a_folder_that_cannot_be_made_is_said_and_does_without(scene: Scene, tracker: Told, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    boxes = Boxes(tmp_path / "file", uuid.uuid4())
    boxes.create()
    assert boxes.folder is None and boxes.trouble is not None and "NotADirectoryError" in boxes.trouble
    bench = Bench.of(tracker, tmp_path / "other")
    bench.runner = Runner(tracker, bench.worker, boxes)
    run_children(scene, tracker, bench, 1)


# -- left-over boxes -------------------------------------------------------------------------------


def test_a_folder_that_another_user_made_in_our_place_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns it could forge outcomes in it."""
    if os.getuid() != 0:
        pytest.skip("only root can make a folder of another user")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "xdg"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    theirs = tmp_path / "xdg" / f"batchtrack-{os.getuid()}"
    theirs.mkdir(parents=True)
    theirs.chmod(0o777)
    os.chown(theirs, 65534, 65534)
    real = Path.mkdir

    def mkdir(path: Path, *args: object, **kwargs: object) -> None:
        if path.is_relative_to(f"/dev/shm/batchtrack-{os.getuid()}"):
            raise PermissionError(path)
        real(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert folders.choose_folder(None) == tmp_path / "tmp" / f"batchtrack-{os.getuid()}"
    assert folders.choose_folder(str(theirs)) == theirs, "asked for by name it is the user's own decision"


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o777)
        yield place


def test_left_over_boxes_of_another_user_keep_no_sweep_from_its_work(shared: Path) -> None:
    """A shared folder: what cannot be read is left alone."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    theirs = Boxes(shared, uuid.uuid4())
    assert theirs.folder is not None
    (theirs.folder / "spool").mkdir(parents=True)
    theirs.folder.chmod(0o700)
    (theirs.folder / "alive").write_text("")
    (theirs.folder / "1-1-1-0.box").write_bytes(bytes(4096))

    def as_nobody() -> None:
        os.setgid(65534)
        os.setuid(65534)
        assert folders.of_dead_workers(shared) == []
        assert folders.with_spool(shared) == set()
        assert folders.held(theirs.folder / "alive") is None  # type: ignore[operator]
        assert blackbox.read(theirs.folder / "1-1-1-0.box") is None  # type: ignore[operator]

    killed(as_nobody)
    assert theirs.folder.exists()


def test_files_that_are_no_boxes_are_passed_over(tmp_path: Path) -> None:
    boxes = Boxes(tmp_path, uuid.uuid4())
    boxes.create()
    assert boxes.folder is not None
    for name in ("x.box", "1-2.box", "a-b-c-d.box", "1-1-1-0-5.box", "x.stack", "1.stack", "a-b.stack", "-.stack"):
        (boxes.folder / name).write_bytes(b"rubbish")
    boxes.page("1:2:3:0")
    (boxes.folder / "1-2.stack").write_bytes(b"")
    assert [slot for slot, _ in boxes.pages()] == ["1:2:3:0"]
    assert [(pid, start) for pid, start, _ in boxes.stacks()] == [(1, 2)]


def test_two_workers_of_one_host_have_boxes_of_their_own(tmp_path: Path) -> None:
    first, second = Boxes(tmp_path, uuid.uuid4()), Boxes(tmp_path, uuid.uuid4())
    first.create()
    first.page("1:2:3:0").enter(KEY, TOKEN)

    def other() -> None:
        second.create()
        second.page("1:2:3:0").enter(ChildKey(uuid7(), 1), new_token())
        assert folders.of_dead_workers(tmp_path) == [], "the first one lives"

    killed(other)
    assert [boxes.worker_id for boxes in folders.of_dead_workers(tmp_path)] == [second.worker_id]
    pages = [blackbox.read(boxes.path("1:2:3:0") or Path()) for boxes in (first, second)]
    assert pages[0] is not None and pages[1] is not None and pages[0].key == KEY != pages[1].key


def test_a_box_of_a_former_version_or_of_a_former_boot_says_nothing_and_names_nobody(tmp_path: Path) -> None:
    """The format of the first release, and a page whose pid is another process's by now."""
    boxes = Boxes(tmp_path, uuid.uuid4())
    boxes.create()
    assert boxes.folder is not None
    old = boxes.folder / "1-1-1-0.box"
    old.write_bytes(b"BTK1" + bytes([2] * 4092))
    assert blackbox.read(old) is None
    this = os.getpid()
    former = f"{this}:{(hosts.started(this) or 0) - 5}:{this}:0"
    boxes.page(former).enter(KEY, TOKEN, Phase.RUNNING)
    assert hosts.gone(*blackbox.slot_process(former)) is True
    assert blackbox.slot_process(blackbox.slot_name()) != blackbox.slot_process(former)


def test_pages_are_kept_by_the_kernel_when_their_process_is_killed_with_an_item_in_hand(path: Path) -> None:
    """From a process of its own, by each way to die that leaves no time for anything."""
    for number in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS):
        code = f"""
import os, uuid
from pathlib import Path
from celery_batchtrack.behaviour.blackbox import Page, Phase
from celery_batchtrack.vocabulary.ids import ChildKey
page = Page(Path({str(path)!r}))
page.enter(ChildKey(uuid.UUID({str(KEY.batch_id)!r}), 7), uuid.UUID({str(TOKEN)!r}), Phase.RUNNING)
page.item_writer(1)(37, b"PMC:37")
page.note("tokenise")
os.kill(os.getpid(), {int(number)})
"""
        ended = subprocess.run([sys.executable, "-c", code], timeout=60)
        assert ended.returncode == -number
        state = said(path)
        assert state.item == InHand(37, 37, "PMC:37", True, False) and state.note == "tokenise"
        assert eventually(lambda: folders.held(path) is False, what="its lock to be free")
