"""Evidence: what tells one root cause from another, and what survives its way over disk."""

from __future__ import annotations

import faulthandler
import json
import tempfile
import threading
import traceback
import uuid
from dataclasses import fields, replace
from typing import Any

import pytest

from celery_batchtrack.vocabulary.evidence import (
    Evidence,
    Frame,
    application_frame,
    fingerprint,
    frames,
    innermost_frames,
)
from celery_batchtrack.vocabulary.states import Cause, Detector

STACK = """Fatal Python error: Segmentation fault

Current thread 0x00007f0c (most recent call first):
  File "/srv/shop/native.py", line 12 in parse
  File "/srv/shop/annotate.py", line 88 in annotate_one
  File "/srv/shop/annotate.py", line 95 in annotate
  File "/usr/lib/python3.12/site-packages/celery/app/trace.py", line 453 in trace_task

Thread 0x00007f0d (most recent call first):
  File "/srv/shop/other.py", line 1 in idle
"""
TRACEBACK = """Traceback (most recent call last):
  File "/usr/lib/python3.12/site-packages/celery/app/trace.py", line 453, in trace_task
    R = retval = fun(*args, **kwargs)
  File "/srv/shop/annotate.py", line 95, in annotate
    annotate_one(doc)
  File "/srv/shop/annotate.py", line 88, in annotate_one
    native.parse(doc)
    ^^^^^^^^^^^^^^^^^
  File "/srv/shop/native.py", line 12, in parse
ValueError: File "not a frame", line x
"""
SEGFAULT = Evidence(Cause.SIGNAL, signal="SIGSEGV", stack=STACK)
ERROR = Evidence(Cause.EXCEPTION, exception="ValueError", traceback=TRACEBACK)

# -- frames ----------------------------------------------------------------------------------------


def test_frames_are_read_from_a_traceback_and_from_a_fatal_stack() -> None:
    assert [str(each) for each in frames(TRACEBACK)] == [
        "trace.py:453 in trace_task", "annotate.py:95 in annotate", "annotate.py:88 in annotate_one",
        "native.py:12 in parse",
    ]  # fmt: skip
    assert innermost_frames(STACK) == frames(TRACEBACK)[::-1]
    assert frames("") == frames("no frame here\nFile x, line 3") == innermost_frames("") == []


def test_frames_are_what_python_itself_prints() -> None:
    try:
        _fail()
    except ValueError:
        found = frames(traceback.format_exc())
    assert [each.function for each in found[-2:]] == ["test_frames_are_what_python_itself_prints", "_fail"]
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=False)
        file.seek(0)
        stack = file.read().decode()
    assert innermost_frames(stack)[0].function == "test_frames_are_what_python_itself_prints"
    assert innermost_frames(stack)[0].path == __file__


def _fail() -> None:
    raise ValueError


def test_a_name_with_spaces_or_brackets_is_a_function_all_the_same() -> None:
    text = '  File "<string>", line 1, in <module>\n  File "/a b/c.py", line 7 in outer.<locals>.<lambda>\n'
    assert frames(text) == [Frame("<string>", 1, "<module>"), Frame("/a b/c.py", 7, "outer.<locals>.<lambda>")]


@pytest.mark.parametrize(
    ("path", "library"),
    [
        ("/srv/shop/tasks.py", False), ("tasks.py", False), ("/srv/celery_tasks/x.py", False),
        ("/home/me/lib/tools.py", False), ("/app/batchtrack/tasks.py", False),
        ("/usr/lib/python3.12/json/decoder.py", True), ("/venv/lib/python3.11/site-packages/numpy/core.py", True),
        ("/usr/lib/python3/dist-packages/yaml/__init__.py", True), ("/src/celery/app/trace.py", True),
        ("/src/billiard/pool.py", True), ("/src/celery_batchtrack/glue/tracked_task.py", True),
        ("<frozen importlib._bootstrap>", True), ("<string>", True),
    ],
)  # fmt: skip
def test_libraries_are_told_from_the_application(path: str, library: bool) -> None:
    assert Frame(path, 1, "f").is_library is library


def test_the_application_frame_is_the_innermost_of_its_own() -> None:
    inside = Frame("/venv/lib/python3.12/site-packages/numpy/core.py", 3, "dot")
    assert application_frame([inside, *innermost_frames(STACK)]) == "native.py:12 in parse"
    assert application_frame([inside]) == "core.py:3 in dot", "none of its own: better a library's than nothing"
    assert application_frame([]) is None
    assert len(application_frame([Frame("/srv/x.py", 1, "f" * 500)]) or "") == 255


# -- fingerprint -----------------------------------------------------------------------------------


def test_one_root_cause_has_one_fingerprint_wherever_it_strikes() -> None:
    elsewhere = replace(
        SEGFAULT, message="died", item="PMC:9", item_index=4, items_done=4, note="page 3", hostname="other", pid=99,
        worker="w2@other", worker_id=uuid.uuid4(), boot_id="b", peak_memory=5, detected_by=Detector.HOST, promised=True,
        versions={"python": "3.13"}, python_frame="native.py:13 in parse",
        stack=STACK.replace("line 12", "line 13").replace("/srv/shop", "/opt/releases/42/shop").replace("7f0c", "1111"),
    )  # fmt: skip
    assert fingerprint("annotate", SEGFAULT) == fingerprint("annotate", elsewhere)
    assert len(fingerprint("annotate", SEGFAULT)) == 16
    int(fingerprint("annotate", SEGFAULT), 16)


def test_other_threads_and_outer_frames_are_no_part_of_it() -> None:
    shorter = replace(SEGFAULT, stack=STACK.partition("\n\nThread")[0].replace("trace_task", "another_caller"))
    assert fingerprint("annotate", shorter) == fingerprint("annotate", SEGFAULT)


@pytest.mark.parametrize(
    "other",
    [
        {"cause": Cause.OOM}, {"signal": "SIGABRT"}, {"phase": "before_claim"}, {"exception": "KeyError"},
        {"stack": STACK.replace("in parse", "in read")}, {"stack": STACK.replace("native.py", "pure.py")},
        {"stack": STACK.replace("in annotate\n", "in annotate_all\n")}, {"stack": None},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_another_cause_or_place_has_another_fingerprint(other: dict[str, Any]) -> None:
    assert fingerprint("annotate", replace(SEGFAULT, **other)) != fingerprint("annotate", SEGFAULT)


def test_another_task_has_another_fingerprint() -> None:
    assert fingerprint("parse", SEGFAULT) != fingerprint("annotate", SEGFAULT)


def test_without_a_stack_the_traceback_and_the_exit_code_tell() -> None:
    moved = replace(ERROR, traceback=TRACEBACK.replace("line 88", "line 90"), message="another text")
    assert fingerprint("annotate", moved) == fingerprint("annotate", ERROR)
    deeper = replace(ERROR, traceback=TRACEBACK.replace("in parse", "in read"))
    assert fingerprint("annotate", deeper) != fingerprint("annotate", ERROR)
    exits = [Evidence(Cause.EXIT, exit_code=code) for code in (None, 0, 1, 3)]
    assert len({fingerprint("annotate", each) for each in exits}) == 4


def test_no_text_is_too_strange_for_a_fingerprint() -> None:
    strange = replace(ERROR, exception="lone \udce9 and nul \0", traceback='File "\udce9", line 1, in f\0')
    assert len(fingerprint("annotate", strange)) == 16


# -- over disk -------------------------------------------------------------------------------------


def test_evidence_survives_its_way_over_disk_but_for_its_clocks() -> None:
    everything = Evidence(
        Cause.OOM, "before_claim", "SIGKILL", 9, "died", "MemoryError", TRACEBACK, "{}", STACK, "native.py:12 in parse",
        "PMC:9", 4, 3, True, "page 3", 1 << 40, "here", "boot", "w1@here", uuid.uuid4(), 41,
        {"python": "3.12"}, Detector.RECONCILE,
    )  # fmt: skip
    unset = [each.name for each in fields(Evidence) if getattr(everything, each.name) is None]
    assert unset == ["died_at"], "every field has a value here"
    assert Evidence.from_json(json.loads(json.dumps(everything.as_json()))) == everything
    bare = Evidence(Cause.EXIT)
    assert Evidence.from_json(json.loads(json.dumps(bare.as_json()))) == bare
    assert not {"noticed", "died_at"} & set(everything.as_json())


@pytest.mark.parametrize(
    "garbage", [{}, {"cause": "boredom"}, {"cause": None}, {"cause": "exit", "worker_id": "me"},
                {"cause": "exit", "worker_id": 5}, {"cause": "exit", "detected_by": "luck"}, None, [], "exit"],
)  # fmt: skip
def test_what_evidence_never_wrote_is_an_error_that_readers_expect(garbage: Any) -> None:
    with pytest.raises((LookupError, ValueError, TypeError)):
        Evidence.from_json(garbage)


def test_what_a_later_version_adds_is_left_out() -> None:
    assert Evidence.from_json({"cause": "exit", "weather": "rain"}) == Evidence(Cause.EXIT)


def test_threads_have_stacks_of_their_own_and_the_first_in_the_text_is_the_one() -> None:
    ready, go = threading.Event(), threading.Event()

    def wait_here() -> None:
        ready.set()
        go.wait(10)

    other = threading.Thread(target=wait_here)
    other.start()
    try:
        assert ready.wait(10)
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stack = file.read().decode()
    finally:
        go.set()
        other.join()
    blocks = stack.split("\n\n")
    assert len(blocks) >= 2
    assert innermost_frames(stack) == frames(blocks[0])
