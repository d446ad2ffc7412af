"""How much memory a process took, and whether it was the kernel that killed it for it."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from celery_batchtrack.behaviour import hosts, memory
from celery_batchtrack.behaviour.detector import Death
from celery_batchtrack.behaviour.memory import KernelKills, Kill, Peaks
from celery_batchtrack.glue.attendant import Attendant
from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary.states import Cause
from tests.helpers import eventually, unique
from tests.store.behaviour_kit import Bench, tracker_on
from tests.store.kit import Scene

MB = 1024 * 1024


def forked(act: Callable[[], object]) -> int:
    """A process that does it and then waits to be killed. Its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            while True:
                signal.pause()
        finally:
            os._exit(1)
    return pid


def take(size: int) -> mmap.mmap:
    """Memory that is really there."""
    held = mmap.mmap(-1, size)
    for at in range(0, size, mmap.PAGESIZE):
        held[at] = 1
    return held


def reap(pid: int) -> int:
    """Minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert reap(pid) == -signal.SIGKILL


# -- peaks -----------------------------------------------------------------------------------------


def test_the_peak_of_a_living_process_grows_with_what_it_takes() -> None:
    ready, told = os.pipe()
    pid = forked(lambda: (take(50 * MB).close(), os.write(told, b"x")))
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    try:
        peak = memory.peak_of(pid)
        assert peak is not None and 50 * MB < peak < 4000 * MB, "also after it was given back"
    finally:
        kill(pid)
    assert memory.peak_of(pid) is None


def test_its_own_peak_is_told_in_bytes() -> None:
    shown = memory.peak_of(os.getpid())
    assert shown is not None and memory.own_peak() == pytest.approx(shown, rel=0.2)


def test_of_the_dead_the_last_sample_is_known_however_often_it_is_asked() -> None:
    peaks = Peaks()
    ready, told = os.pipe()
    pid = forked(lambda: (take(30 * MB).close(), os.write(told, b"x")))
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    peaks.sample({pid})
    kill(pid)
    first = peaks.of_the_dead(pid)
    assert first is not None and first > 30 * MB
    assert peaks.of_the_dead(pid) == first, "a verdict may wait for the database"
    peaks.sample(set())
    assert peaks.of_the_dead(pid) is None, "and is forgotten with its page"


def test_what_died_of_memory_between_two_samples_is_told_by_what_was_reaped_and_no_other_death_is() -> None:
    """It is most likely the largest so far; anything else that died at the same time is not."""
    already = memory.resource.getrusage(memory.resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    peaks = Peaks()
    size = max(already, memory.own_peak()) + 20 * MB
    ready, told = os.pipe()
    pid = forked(lambda: (take(size).close(), os.write(told, b"x")))
    os.read(ready, 1)
    os.close(ready)
    os.close(told)
    kill(pid)
    assert peaks.of_the_dead(pid + 1) is None, "by hand, at the same time"
    found = peaks.of_the_dead(pid, Kill("oom_kill went up"))
    assert found is not None and found > size
    assert peaks.of_the_dead(pid, Kill("oom_kill went up")) == found
    assert peaks.of_the_dead(pid + 2, Kill("oom_kill went up")) is None, "it was smaller, and nobody knows how much"


def test_what_the_kernel_says_goes_before_a_guess() -> None:
    peaks = Peaks()
    assert peaks.of_the_dead(1, Kill("the log", 5 * MB)) == 5 * MB
    peaks._seen[2] = 9 * MB
    assert peaks.of_the_dead(2, Kill("the log", 5 * MB)) == 9 * MB, "it had been larger before"


# -- real kills ------------------------------------------------------------------------------------


@pytest.fixture
def limited() -> Iterator[Path]:
    """A cgroup that lets its processes have 80 MB."""
    group = _new_group("memory", "memory.limit_in_bytes") or _new_group("", "memory.max")
    if group is None:
        pytest.skip("needs the right to make a memory cgroup")
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text(), what="the cgroup to be empty")
    eventually(lambda: _removed(group), what="the cgroup to be removed")


def _new_group(controller: str, limit: str) -> Path | None:
    group = Path("/sys/fs/cgroup") / controller / unique("bt")
    try:
        group.mkdir()
    except OSError:
        return None
    try:
        (group / limit).write_text(str(80 * MB))
    except OSError:
        group.rmdir()
        return None
    return group


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:
        return False
    return True


def member(group: Path, *, greedy: Callable[[], object]) -> tuple[int, int]:
    """A process in the cgroup that begins when a byte is written: (its pid, where to write)."""
    ready, told = os.pipe()
    begin, go = os.pipe()

    def act() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        os.write(told, b"x")
        os.read(begin, 1)
        greedy()

    pid = forked(act)
    os.read(ready, 1)
    for each in (ready, told, begin):
        os.close(each)
    return pid, go


def starve(group: Path, kernel: KernelKills) -> int:
    """Let the kernel kill a process that `kernel` has seen alive. Its pid."""
    pid, go = member(group, greedy=lambda: take(400 * MB))
    kernel.look({pid})
    os.write(go, b"x")
    os.close(go)
    assert reap(pid) == -signal.SIGKILL
    return pid


@pytest.fixture
def kernel() -> Iterator[KernelKills]:
    kernel = KernelKills()
    yield kernel
    kernel.close()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelKills]:
    """One that may not read the kernel's log, as in most containers."""
    monkeypatch.setattr(memory, "_KMSG", Path("/nonexistent"))
    kernel = KernelKills()
    assert kernel._log is None
    yield kernel


def test_the_kernels_log_names_what_it_killed_for_memory(limited: Path, kernel: KernelKills) -> None:
    if kernel._log is None:
        pytest.skip("the kernel's log cannot be read here")
    pid = starve(limited, kernel)
    why = eventually(lambda: kernel.was(pid), what="the kernel's own words")
    assert why.why == "the kernel's log says that it was killed for memory"
    assert why.memory is not None and 40 * MB < why.memory < 4000 * MB
    assert kernel.was(pid) is None, "one death, one kill"


def test_the_counter_of_its_cgroup_tells_where_the_log_cannot_be_read(limited: Path, counting: KernelKills) -> None:
    pid = starve(limited, counting)
    killed = counting.was(pid)
    assert killed is not None and killed.why.startswith("oom_kill of /sys/fs/cgroup") and killed.memory is None
    assert counting.was(pid) is None, "one death, one kill"


def test_two_kills_explain_two_deaths_and_not_a_third(limited: Path, counting: KernelKills) -> None:
    pids = [starve(limited, counting), starve(limited, counting)]
    counting.look(set(pids))
    assert all(counting.was(pid) for pid in pids)
    assert counting.was(pids[0]) is None


@pytest.mark.parametrize("readable", [True, False])
def test_a_kill_by_hand_is_not_the_kernels(limited: Path, monkeypatch: pytest.MonkeyPatch, readable: bool) -> None:
    if not readable:
        monkeypatch.setattr(memory, "_KMSG", Path("/nonexistent"))
    kernel = KernelKills()
    pid, go = member(limited, greedy=lambda: take(MB))
    kernel.look({pid})
    kill(pid)
    os.close(go)
    assert kernel.was(pid) is None
    kernel.close()


def test_a_kill_in_another_cgroup_does_not_explain_a_kill_by_hand(limited: Path, counting: KernelKills) -> None:
    outside = forked(lambda: None)
    inside, go = member(limited, greedy=lambda: take(400 * MB))
    counting.look({inside, outside})
    os.write(go, b"x")
    os.close(go)
    reap(inside)
    kill(outside)
    assert counting.was(outside) is None
    assert counting.was(inside) is not None


def test_a_kill_that_nobody_asked_for_in_time_was_anothers(limited: Path, counting: KernelKills) -> None:
    """The application's own subprocess; minutes later somebody kills a pool process by hand."""
    pool, go = member(limited, greedy=lambda: None)
    counting.look({pool}, forget=True)
    starve_another, go2 = member(limited, greedy=lambda: take(400 * MB))
    os.write(go2, b"x")
    os.close(go2)
    assert reap(starve_another) == -signal.SIGKILL
    counting.look({pool}, forget=True)  # one beat later it is still fresh: its death may be about to be told
    counting.look({pool}, forget=True)
    kill(pool)
    os.close(go)
    assert counting.was(pool) is None


def test_a_kill_is_remembered_over_a_beat(limited: Path, counting: KernelKills) -> None:
    """A beat may come between a death and its being told."""
    pid = starve(limited, counting)
    counting.look({pid}, forget=True)
    assert counting.was(pid) is not None


def test_kills_are_not_forgotten_while_verdicts_wait_for_the_database(limited: Path, counting: KernelKills) -> None:
    pid = starve(limited, counting)
    for _ in range(5):
        counting.look({pid})
    assert counting.was(pid) is not None


# -- what the attendant makes of it ----------------------------------------------------------------


@pytest.fixture
def scene(sqlite_url: str) -> Iterator[Scene]:
    scene = Scene(Store(sqlite_url, engine_options={"connect_args": {"timeout": 0.01}}))
    assert scene.store.store_id
    yield scene
    scene.store.dispose()


@pytest.fixture
def attendant(scene: Scene, tmp_path: Path) -> Iterator[Attendant]:
    """Of a worker whose main process is this one."""
    bench = Bench.of(tracker_on(scene.store), tmp_path / "boxes")
    scene.worker_id = bench.worker.id
    attendant = Attendant(bench.tracker, bench.worker, bench.boxes)
    yield attendant
    attendant._kernel.close()


def run_in(group: Path, attendant: Attendant, scene: Scene, batch_id: uuid.UUID) -> tuple[int, int]:
    """A child's run in the cgroup, of which the attendant knows: (pid, where to write for it to take too much)."""
    pid, go = member(group, greedy=lambda: take(400 * MB))
    slot = f"{pid}:{hosts.started(pid)}:{pid}:0"
    scene.run(batch_id, slot=slot)
    attendant.boxes.page(slot)
    attendant._look_at_processes()
    return pid, go


def test_a_child_that_a_memory_limit_killed_is_told_apart_from_one_killed_by_hand(
    limited: Path, scene: Scene, attendant: Attendant
) -> None:
    starved, by_hand = scene.batch(1), scene.batch(1)
    first, go = run_in(limited, attendant, scene, starved)
    second, other = run_in(limited, attendant, scene, by_hand)
    os.write(go, b"x")
    assert reap(first) == -signal.SIGKILL
    kill(second)
    for each in (go, other):
        os.close(each)
    for pid in (first, second):
        attendant.died(Death(pid, hosts.started(pid), Cause.SIGNAL, signal="SIGKILL", message="signal 9 (SIGKILL)"))
    attendant._take(0.0)
    (oom,), (killed,) = scene.incidents(starved), scene.incidents(by_hand)
    assert (oom.cause, oom.signal) == ("oom", "SIGKILL") and (oom.message or "").startswith("out of memory: ")
    assert (killed.cause, killed.signal, killed.message) == ("signal", "SIGKILL", "signal 9 (SIGKILL)")
    assert oom.peak_memory is not None and oom.peak_memory > 40 * MB


def test_what_the_kernel_says_is_asked_once_though_the_verdict_waits_for_the_database(
    limited: Path, scene: Scene, attendant: Attendant, tmp_path: Path
) -> None:
    batch_id = scene.batch(1)
    pid, go = run_in(limited, attendant, scene, batch_id)
    os.write(go, b"x")
    os.close(go)
    assert reap(pid) == -signal.SIGKILL
    attendant.died(Death(pid, None, Cause.SIGNAL, signal="SIGKILL"))
    with contextlib.closing(sqlite3.connect(tmp_path / "batchtrack.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            attendant._take(0.0)
            attendant._look_at_processes()
        assert scene.statuses(batch_id) == ["running"]
        other.rollback()
    attendant._take(0.0)
    (incident,) = scene.incidents(batch_id)
    assert incident.cause == "oom" and incident.peak_memory is not None


# -- formats ---------------------------------------------------------------------------------------

V1 = "oom_kill_disable 0\nunder_oom 0\noom_kill {0}\n"
V2 = "low 0\nhigh 0\nmax 12\noom 4\noom_kill {0}\noom_group_kill 0\n"


class Forged:
    """A /proc and a /sys/fs/cgroup of files that a test writes."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.proc, self.groups = root / "proc", root / "cgroup"
        for name, place in (("_PROC", self.proc), ("_CGROUPS", self.groups), ("_KMSG", root / "kmsg")):
            monkeypatch.setattr(memory, name, place)

    def process(self, pid: int | str, *lines: str) -> None:
        (self.proc / str(pid)).mkdir(parents=True, exist_ok=True)
        (self.proc / str(pid) / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def counter(self, path: str, text: str) -> None:
        file = self.groups / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def forged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Forged:
    return Forged(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("line", "path", "text"),
    [
        ("0::/kubepods/pod1", "kubepods/pod1/memory.events", V2),
        ("0::/", "memory.events", V2),
        ("0::/user.slice", "unified/user.slice/memory.events", V2),
        ("4:memory:/docker/abc", "memory/docker/abc/memory.oom_control", V1),
        ("4:cpu,memory:/docker/abc", "memory/memory.oom_control", V1),
    ],
)  # fmt: skip
def test_counters_are_found_where_each_version_has_them(forged: Forged, line: str, path: str, text: str) -> None:
    forged.process("self", "1:name=systemd:/x", "2:cpuset:/y", line)
    forged.counter(path, text.format(7))
    kernel = KernelKills()
    assert kernel.was(1) is None
    forged.counter(path, text.format(8))
    assert kernel.was(1) == Kill(f"oom_kill of {forged.groups / path} went up")
    assert kernel.was(1) is None


def test_a_kill_below_is_counted_once_where_the_groups_above_count_it_too(forged: Forged) -> None:
    forged.process("self", "0::/a")
    forged.process(5, "0::/a/b")
    forged.process(6, "0::/a")
    forged.counter("a/memory.events", V2.format(0))
    forged.counter("a/b/memory.events", V2.format(0))
    kernel = KernelKills()
    kernel.look({5, 6})
    forged.counter("a/b/memory.events", V2.format(1))
    forged.counter("a/memory.events", V2.format(1))
    assert kernel.was(5) is not None
    assert kernel.was(6) is None, "killed by hand"
    forged.counter("a/memory.events", V2.format(2))
    assert kernel.was(6) is not None


def test_version_one_counts_each_group_for_itself(forged: Forged) -> None:
    forged.process("self", "4:memory:/a")
    forged.process(5, "4:memory:/a/b")
    for group in ("a", "a/b"):
        forged.counter(f"memory/{group}/memory.oom_control", V1.format(0))
    kernel = KernelKills()
    kernel.look({5})
    forged.counter("memory/a/b/memory.oom_control", V1.format(1))
    forged.counter("memory/a/memory.oom_control", V1.format(1))
    assert kernel.was(5) is not None and kernel.was(6) is not None


def test_a_process_is_asked_for_in_the_group_it_was_first_seen_in(forged: Forged) -> None:
    """Of a dead one that nobody has reaped yet, version 1 says that it is in the root."""
    forged.process("self", "4:memory:/a")
    forged.process(5, "4:memory:/b")
    for group in ("a", "b", "."):
        forged.counter(f"memory/{group}/memory.oom_control", V1.format(0))
    kernel = KernelKills()
    kernel.look({5})
    forged.counter("memory/b/memory.oom_control", V1.format(1))
    forged.process(5, "4:memory:/")
    kernel.look({5})
    assert kernel.was(5) is not None


@pytest.mark.parametrize("text", ["", "oom_kill", "oom_kill x", "rubbish\n", "oom_kill_disable 0\nunder_oom 0\n"])
def test_a_counter_that_cannot_be_read_explains_nothing(forged: Forged, text: str) -> None:
    forged.process("self", "0::/")
    forged.counter("memory.events", V2.format(1))
    kernel = KernelKills()
    forged.counter("memory.events", text)
    assert kernel.was(1) is None
    kernel.look({1, 2}, forget=True)
    (forged.groups / "memory.events").unlink()
    kernel.look(set(), forget=True)
    assert kernel.was(1) is None


def test_without_cgroups_and_log_nothing_is_explained(forged: Forged) -> None:
    kernel = KernelKills()
    kernel.look({1, 2, os.getpid()})
    assert kernel.was(os.getpid()) is None
    forged.process("self", "garbage", "1:memory", "0:")
    kernel.look()
    assert kernel.was(1) is None


@pytest.mark.parametrize("text", ["", "VmHWM:\n", "VmHWM:\t x kB\n", "Name:\tpython\nVmHWM:\t    2048 MB\n"])
def test_a_status_without_the_peak_is_none(forged: Forged, text: str) -> None:
    (forged.proc / "5").mkdir(parents=True)
    (forged.proc / "5" / "status").write_text(text)
    assert memory.peak_of(5) is None
    (forged.proc / "5" / "status").write_text("Name:\tpy\nVmHWM:\t    2048 kB\nVmRSS:\t 5 kB\n")
    assert memory.peak_of(5) == 2 * MB
