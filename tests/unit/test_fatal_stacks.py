"""The Python stack of a fatal signal, left behind by real processes that really die of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from celery_batchtrack.behaviour import fatal
from celery_batchtrack.behaviour.fatal import FatalStack
from tests.helpers import ROOT, eventually

#: What an application has in its own file, and what each process starts with.
USER = """
import ctypes, json, os, signal, sys, threading

def die(number):
    os.kill(os.getpid(), number)

def really_segfault():
    ctypes.string_at(0)

def parse_deeply():
    sys.setrecursionlimit(10**7)
    json.loads("[" * 100_000 + "]" * 100_000)

def annotate_one(document, how):
    how()

def annotate(documents, how):
    for document in documents:
        annotate_one(document, how)
"""
PREPARED = """
import faulthandler, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from celery_batchtrack.behaviour import fatal
import user
stack = Path({stack!r})
"""


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    (tmp_path / "user.py").write_text(USER)
    return tmp_path / "1-1.stack"


def run(stack: Path, code: str, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run it in a fresh interpreter that has `fatal`, `user` and `stack`."""
    source = PREPARED.format(folder=str(stack.parent), stack=str(stack)) + textwrap.dedent(code)
    known = {name: value for name, value in os.environ.items() if name != "PYTHONFAULTHANDLER"}
    return subprocess.run(
        [sys.executable, *options, "-c", source], cwd=ROOT, env={**known, **env}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


def told(stack: Path) -> FatalStack:
    found = fatal.read(stack)
    assert found is not None, "no stack was written"
    return found


# -- deaths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fatal.FATAL)
def test_a_fatal_signal_leaves_the_stack_of_the_users_function(stack: Path, name: str) -> None:
    number = getattr(signal, name)
    ended = run(stack, f"assert fatal.install(stack, None); user.annotate([1], lambda: user.die({int(number)}))")
    assert ended.returncode == -number, ended.stderr
    found = told(stack)
    assert found.signal == name and found.thread is not None
    assert found.frame == "user.py:5 in die"
    frames = [line.strip() for line in found.text.splitlines() if "user.py" in line]
    assert [line.rsplit(" in ", 1)[1] for line in frames] == ["die", "annotate_one", "annotate"]
    assert ended.stderr == "", "it went to the file alone"


def test_native_code_that_reads_what_is_not_there_is_told_by_its_caller(stack: Path) -> None:
    ended = run(stack, "fatal.install(stack, None); user.annotate([1], user.really_segfault)")
    assert ended.returncode == -signal.SIGSEGV
    assert told(stack).frame == "user.py:8 in really_segfault", "ctypes itself is no application"


def test_the_thread_that_died_comes_first_and_is_named(stack: Path) -> None:
    ended = run(
        stack,
        """
        fatal.install(stack, None)
        import threading
        other = threading.Thread(target=threading.Event().wait, daemon=True)
        other.start()
        def dies():
            print(threading.get_ident(), flush=True)
            user.annotate([1], user.really_segfault)
        threading.Thread(target=dies).start()
        threading.Event().wait()
        """,
    )
    assert ended.returncode == -signal.SIGSEGV
    found = told(stack)
    assert found.thread == int(ended.stdout)
    assert found.frame == "user.py:8 in really_segfault"
    assert found.text.splitlines()[0] == "Fatal Python error: Segmentation fault"
    assert found.text.splitlines()[2].startswith("Current thread 0x")
    assert found.text.count("hread 0x") == 3, "the others are told behind it"


RECURSION = """
    import threading
    threading.stack_size(256 * 1024)
    def dies():
        fatal.cover_thread()
        user.parse_deeply()
    thread = threading.Thread(target=dies)
    thread.start()
    thread.join()
"""


def test_a_native_stack_that_overflows_in_a_thread_is_told_too(stack: Path) -> None:
    """A handler needs a stack to run on, and the thread's own is used up."""
    ended = run(stack, "fatal.install(stack, None)\n" + textwrap.dedent(RECURSION))
    assert ended.returncode == -signal.SIGSEGV, ended.stderr
    assert (told(stack).signal, told(stack).frame) == ("SIGSEGV", "user.py:12 in parse_deeply")


def test_threads_of_the_application_are_covered_without_its_doing(stack: Path) -> None:
    code = textwrap.dedent(RECURSION).replace("    fatal.cover_thread()\n", "")
    ended = run(stack, "fatal.install(stack, None)\n" + code)
    assert ended.returncode == -signal.SIGSEGV, ended.stderr
    assert told(stack).signal == "SIGSEGV"


def test_a_covered_thread_gives_its_memory_back_and_its_profiler_is_its_own(stack: Path) -> None:
    ended = run(
        stack,
        """
        fatal.install(stack, None)
        import gc, sys, threading
        seen = []
        def work():
            seen.append(sys.getprofile())
            fatal.cover_thread()
            fatal.cover_thread()
            seen.append(fatal._covered.stack)
        for _ in range(50):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert [each for each in seen[::2] if each is not None] == []
        del thread
        seen.clear()
        gc.collect()
        kinds = [each for each in gc.get_objects() if type(each) is fatal._AlternateStack]
        assert kinds == [], kinds
        fatal.cover_thread()
        assert not hasattr(fatal._covered, "stack"), "the main thread has faulthandler's own"
        """,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_profiler_that_the_application_set_for_its_threads_stays(stack: Path) -> None:
    ended = run(
        stack,
        """
        import threading
        mine = lambda *arguments: None
        threading.setprofile(mine)
        fatal.install(stack, None)
        assert threading.getprofile() is mine
        fatal.uninstall()
        assert threading.getprofile() is mine
        """,
    )
    assert ended.returncode == 0, ended.stderr


def test_sigkill_leaves_none(stack: Path) -> None:
    ended = run(stack, "fatal.install(stack, None); user.annotate([1], lambda: user.die(9))")
    assert ended.returncode == -signal.SIGKILL
    assert stack.read_text() == "" and fatal.read(stack) is None


# -- whose faulthandler it is ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["environment", "option"])
def test_one_that_only_the_environment_asked_for_is_taken_over_and_echoed(stack: Path, how: str) -> None:
    options = ("-X", "faulthandler") if how == "option" else ()
    env = {"PYTHONFAULTHANDLER": "1"} if how == "environment" else {}
    ended = run(
        stack,
        """
        assert faulthandler.is_enabled() and fatal.echoed()
        assert fatal.install(stack, None)
        user.annotate([1], user.really_segfault)
        """,
        *options, **env,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGSEGV
    assert told(stack).frame == "user.py:8 in really_segfault" and ended.stderr == ""


def test_without_one_nothing_is_echoed(stack: Path) -> None:
    ended = run(stack, "assert not fatal.echoed(); fatal.install(stack, None); assert not fatal.echoed()")
    assert ended.returncode == 0, ended.stderr


def test_the_environments_own_is_back_after_a_clean_end(stack: Path) -> None:
    ended = run(
        stack,
        """
        fatal.install(stack, None)
        fatal.uninstall()
        assert not stack.exists()
        user.annotate([1], user.really_segfault)
        """,
        PYTHONFAULTHANDLER="1",
    )
    assert ended.returncode == -signal.SIGSEGV and "Segmentation fault" in ended.stderr


OWN = """
own = open(stack.with_suffix(".own"), "wb")
faulthandler.enable(own)
"""


def test_one_that_the_application_enabled_for_itself_is_kept(stack: Path) -> None:
    ended = run(stack, OWN + "assert fatal.install(stack, None) is False\nuser.annotate([1], user.really_segfault)")
    assert ended.returncode == -signal.SIGSEGV, ended.stderr
    assert not stack.exists()
    assert "Segmentation fault" in stack.with_suffix(".own").read_text()


def test_it_is_taken_over_where_the_setting_says_so(stack: Path) -> None:
    ended = run(stack, OWN + "assert fatal.install(stack, True) is True\nuser.annotate([1], user.really_segfault)")
    assert ended.returncode == -signal.SIGSEGV, ended.stderr
    assert told(stack).signal == "SIGSEGV" and stack.with_suffix(".own").read_text() == ""


def test_nothing_is_installed_where_the_setting_says_no(stack: Path) -> None:
    ended = run(
        stack,
        "assert fatal.install(stack, False) is False; assert not faulthandler.is_enabled(); assert not stack.exists()",
    )
    assert ended.returncode == 0, ended.stderr


def test_user_code_that_switches_it_off_is_told_once(stack: Path) -> None:
    ended = run(
        stack,
        """
        assert not fatal.just_lost()
        fatal.install(stack, None)
        assert not fatal.just_lost()
        faulthandler.disable()
        assert fatal.just_lost() and not fatal.just_lost()
        user.annotate([1], user.really_segfault)
        """,
    )
    assert ended.returncode == -signal.SIGSEGV
    assert fatal.read(stack) is None


def test_a_file_that_cannot_be_made_is_an_error_and_changes_nothing(stack: Path) -> None:
    ended = run(
        stack,
        """
        try:
            fatal.install(Path("/nowhere/at/all.stack"), None)
        except OSError:
            assert not faulthandler.is_enabled() and not fatal.just_lost()
            fatal.uninstall()
        else:
            raise SystemExit("no error")
        """,
    )
    assert ended.returncode == 0, ended.stderr


# -- the end, and other processes ------------------------------------------------------------------


def test_a_clean_end_removes_the_file_and_leaves_no_handler(stack: Path) -> None:
    ended = run(
        stack,
        """
        import threading
        fatal.install(stack, None)
        assert stack.exists()
        fatal.uninstall()
        fatal.uninstall()
        assert not stack.exists() and not faulthandler.is_enabled() and threading.getprofile() is None
        import os
        os.kill(os.getpid(), fatal.DUMP_SIGNAL)
        """,
    )
    assert ended.returncode == -(fatal.DUMP_SIGNAL or 0), "it is the default action again"


def test_a_process_that_the_application_forks_does_not_tell_its_death_as_its_parents(stack: Path) -> None:
    ended = run(
        stack,
        """
        import os
        fatal.install(stack, None)
        pid = os.fork()
        if pid == 0:
            fatal.uninstall()
            user.annotate([1], user.really_segfault)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -11
        assert stack.read_text() == "", stack.read_text()
        user.annotate([1], lambda: user.die(6))
        """,
    )
    assert ended.returncode == -signal.SIGABRT, ended.stderr
    assert told(stack).signal == "SIGABRT"


def test_a_forked_process_may_have_a_file_of_its_own(stack: Path) -> None:
    """As a pool process does, whose main process has one for its own threads."""
    ended = run(
        stack,
        """
        import os
        fatal.install(stack, None)
        own = stack.with_name("2-2.stack")
        pid = os.fork()
        if pid == 0:
            assert fatal.install(own, None)
            user.annotate([1], user.really_segfault)
        os.waitpid(pid, 0)
        assert "Segmentation" in own.read_text() and stack.read_text() == ""
        """,
    )
    assert ended.returncode == 0, ended.stderr


# -- a dump on demand ------------------------------------------------------------------------------


@contextmanager
def living(stack: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that says when it is ready, and then does what it does."""
    source = PREPARED.format(folder=str(stack.parent), stack=str(stack)) + textwrap.dedent(code)
    with subprocess.Popen(
        [sys.executable, "-c", source], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def dump(process: subprocess.Popen[str], stack: Path) -> FatalStack:
    assert fatal.DUMP_SIGNAL is not None
    before = stack.stat().st_size
    process.send_signal(fatal.DUMP_SIGNAL)
    eventually(lambda: stack.stat().st_size > before, what="a stack in the file")
    size = -1

    def settled() -> bool:
        nonlocal size
        size, former = stack.stat().st_size, size
        return size == former

    eventually(settled, what="the whole of it")
    return told(stack)


def test_a_process_writes_where_it_is_and_lives_on(stack: Path) -> None:
    code = """
    fatal.install(stack, None)
    user.annotate([1, 2], lambda: (print("ready", flush=True), sys.stdin.readline()))
    """
    with living(stack, code) as process:
        found = dump(process, stack)
        assert (found.signal, found.frame) == (None, "user.py:15 in annotate_one")
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        again = dump(process, stack)
        assert "annotate" in again.text and again.text.count("Current thread") == 1, "the last dump alone"
        process.stdin.close()
        assert process.wait(20) == 0


def test_native_code_that_holds_the_gil_is_seen_too(stack: Path) -> None:
    """No Python code of that process runs any more, its threads included."""
    code = """
    fatal.install(stack, None)
    import re
    user.annotate([1], lambda: (print("ready", flush=True), re.match("(a+)+$", "a" * 60 + "b")))
    """
    with living(stack, code) as process:
        found = dump(process, stack)
        assert found.thread is not None and found.frame == "user.py:15 in annotate_one"
        assert process.poll() is None


def test_a_call_that_holds_the_gil_does_not_keep_the_stack_back(stack: Path) -> None:
    code = """
    import ctypes
    libc = ctypes.PyDLL(None)  # keeps the GIL
    fatal.install(stack, None)
    def hold():
        print("ready", flush=True)
        while True:
            libc.sleep(30)
    user.annotate([1], hold)
    """
    with living(stack, code) as process:
        found = dump(process, stack)
        assert found.thread is not None and "annotate_one" in found.text
        assert process.poll() is None


def test_an_application_that_has_the_signal_keeps_it(stack: Path) -> None:
    ended = run(
        stack,
        """
        import os, signal
        seen = []
        signal.signal(fatal.DUMP_SIGNAL, lambda *arguments: seen.append(1))
        fatal.install(stack, None)
        os.kill(os.getpid(), fatal.DUMP_SIGNAL)
        assert seen == [1] and stack.read_text() == ""
        fatal.uninstall()
        os.kill(os.getpid(), fatal.DUMP_SIGNAL)
        assert seen == [1, 1]
        """,
    )
    assert ended.returncode == 0, ended.stderr


# -- reading ---------------------------------------------------------------------------------------

SEGFAULT = """Fatal Python error: Segmentation fault

Thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "/srv/shop/other.py", line 1 in other

Current thread 0x00007f0000000002 (most recent call first):
  File "/srv/venv/lib/python3.11/site-packages/lxml/etree.py", line 9 in parse
  File "/srv/shop/tasks.py", line 88 in annotate_one
  File "/srv/shop/tasks.py", line 102 in annotate

Extension modules: lxml.etree (total: 1)
"""


def test_the_thread_that_died_is_put_first() -> None:
    found = fatal.parse(SEGFAULT)
    assert found is not None
    assert (found.signal, found.frame, found.thread) == ("SIGSEGV", "tasks.py:88 in annotate_one", 0x7F0000000002)
    assert found.text.index("Current thread") < found.text.index("Thread 0x00007f0000000001")


def test_a_thread_that_python_does_not_know_is_told_by_the_main_thread() -> None:
    """Native code may die in a thread of its own, while its caller waits."""
    text = SEGFAULT.replace("Current thread", "Thread")
    found = fatal.parse(text)
    assert found is not None and found.thread is None
    assert found.frame == "tasks.py:88 in annotate_one", "the oldest thread, which faulthandler tells last"


def test_a_thread_that_died_without_a_python_frame_blames_no_other() -> None:
    nowhere = "Current thread 0x01 (most recent call first):\n  <no Python frame>\n\n"
    others = SEGFAULT.replace("Current t", "T").partition("\n\n")[2]
    found = fatal.parse("Fatal Python error: Aborted\n\n" + nowhere + others)
    assert found is not None and (found.signal, found.frame, found.thread) == ("SIGABRT", None, 1)


def test_the_last_of_several_dumps_counts() -> None:
    dump = 'Current thread 0x{0} (most recent call first):\n  File "a.py", line {1} in work\n\n'
    other = 'Thread 0xa (most recent call first):\n  File "b.py", line 1 in wait\n\n'
    first, second = other + dump.format("b", 1), other + dump.format("b", 2)
    found = fatal.parse(first + second)
    assert found is not None and found.frame == "a.py:2 in work" and found.text.count("Thread 0xa") == 1
    fatally = fatal.parse(first + SEGFAULT)
    assert fatally is not None and fatally.signal == "SIGSEGV" and "a.py" not in fatally.text


@pytest.mark.parametrize(
    "text",
    [
        "", "\0" * 5000, "Fatal Python error: ", "Fatal Python error: Segmentation fault\n", "Thread 0x\n",
        "Current thread 0xzz (most", "\n" * 100_000, 'File "' * 10_000,
    ],
)  # fmt: skip
def test_what_is_no_stack_is_none(text: str) -> None:
    assert fatal.parse(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Current thread 0x" + "f" * 200_000 + " (most recent call first):\n",
        "Fatal Python error: " + "x" * 200_000 + "\nThread 0x1\n" + '  File "' * 30_000,
        "Thread 0x1 (most recent call first):\n" * 6000,
        "Thread 0x1\n" + '  File "x", line ' + "9" * 100_000 + " in f\n" * 20_000,
        "Thread 0x1\n" + '  File "x.py", line 1 in ' + " " * 200_000,
        "Thread 0x1\n" + '  File "x.py", line 1 in ' + " " * 200_000 + "x",
        "Thread 0x1\n" + " " * 200_000 + 'File "x.py", line 1 in f',
        SEGFAULT * 400,
        *(SEGFAULT[:at] for at in range(95, len(SEGFAULT), 7)),
    ],
)  # fmt: skip
def test_hostile_and_cut_text_is_read_in_bounds(text: str) -> None:
    began = time.perf_counter()
    found = fatal.parse(text)
    assert time.perf_counter() - began < 2
    assert found is None or (len(found.text) <= 16_000 and len(found.frame or "") <= 255)


def test_a_huge_file_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "1-1.stack"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
        file.seek(0, os.SEEK_END)
        file.write(b"\xff\xfe\n" + SEGFAULT.encode())
    found = fatal.read(path)
    assert found is not None and found.frame == "tasks.py:88 in annotate_one"


def test_what_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert fatal.read(None) is None
    assert fatal.read(tmp_path / "missing.stack") is None
    assert fatal.read(tmp_path) is None
