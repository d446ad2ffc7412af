"""Tasks for Celery's canvas, canvases of every shape, and what they come to.

Broker and settings come from the environment; with `replace_celery_chord` among the settings, Celery's own chords are
tracked too. What a task does besides returning, it writes to a file, its `place`, one line each time.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from celery import Celery, Task, chain, group
from celery.canvas import chord as celery_chord
from celery.canvas import maybe_signature
from celery.exceptions import SoftTimeLimitExceeded

from celery_batchtrack import BatchTrack, chord


class Expected(Exception):
    """What a task raises because a test wants it to."""


def tell(place: str, line: object) -> None:
    if place:
        with Path(place).open("a") as file:
            file.write(f"{line}\n")


def tasks_of(app: Celery) -> SimpleNamespace:
    """The tasks, registered with this app; `shared=False`, since a process may have several."""
    made = SimpleNamespace()

    def task(**options: Any) -> Callable[[Callable[..., Any]], Any]:
        def register(function: Callable[..., Any]) -> Any:
            name = function.__name__
            setattr(made, name, app.task(name=f"canvas.{name}", shared=False, **options)(function))
            return getattr(made, name)

        return register

    # -- plain ones ----------------------------------------------------------------------------------

    @task()
    def identity(value: Any, place: str = "") -> Any:
        tell(place, json.dumps(value))
        return value

    @task()
    def add(left: Any, right: Any, more: int = 0) -> Any:
        return left + right + more if more else left + right

    @task()
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @task()
    def fail(*args: Any) -> NoReturn:
        raise Expected("as wanted")

    @task()
    def segfault(place: str = "") -> NoReturn:
        tell(place, "killed")
        ctypes.string_at(0)
        raise AssertionError("survived")

    @task()
    def note(line: Any, place: str) -> Any:
        """Leaves a trace, whatever becomes of its result."""
        tell(place, json.dumps(line))
        return line

    @task()
    def wait(place: str) -> str:
        """Says that it runs, then waits until a test lets it go on."""
        tell(place, "waits")
        while not Path(f"{place}.go").exists():
            time.sleep(0.01)
        return "went on"

    @task(bind=True)
    def context(self: Task, *args: Any, place: str = "", label: Any = None) -> dict[str, Any]:
        """Everything that this run knows of its message."""
        request = self.request
        told = {
            "label": label,
            "id": request.id,
            "root": request.root_id,
            "parent": request.parent_id,
            "queue": request.delivery_info.get("routing_key"),
            "priority": request.delivery_info.get("priority"),
            "expires": request.expires is not None,
            "own": request.get("own"),
            "stamps": request.stamps,
            "stamped": sorted(request.stamped_headers or ()),
            "at": time.time(),
        }
        tell(place, json.dumps(told))
        return told

    @task(bind=True, max_retries=1)
    def retries(self: Task, place: str) -> str:
        """Fails once, and tells its stamps each time."""
        tell(place, json.dumps(self.request.stamps))
        if not self.request.retries:
            raise self.retry(countdown=0)
        return "at the second"

    @task()
    def guarded() -> int:
        """Comes to nothing when its soft time limit strikes, and to an end by itself only long after that."""
        try:
            time.sleep(60)
        except SoftTimeLimitExceeded:
            return 0
        return 1

    # -- callbacks -----------------------------------------------------------------------------------

    @task()
    def old_errback(request_id: str, *, place: str) -> str:
        tell(place, request_id)
        return request_id

    @task()
    def new_errback(request: Any, error: BaseException, traceback: Any, *, place: str) -> None:
        tell(place, request.id)

    @task()
    def told_errback(request: Any, error: BaseException, traceback: Any, *, place: str) -> None:
        """Says what it was told of the error."""
        tell(place, json.dumps([request.id, type(error).__name__, str(error)]))

    # -- those that start a chord -----------------------------------------------------------------------

    @task(bind=True)
    def starts(self: Task, place: str) -> None:
        chord([context.si(label="header", place=place)] * 2)(context.si(label="body", place=place))
        tell(place, json.dumps({"label": "starter", "id": self.request.id, "root": self.request.root_id}))

    # -- those that become something else ---------------------------------------------------------------

    @task(bind=True)
    def becomes(self: Task, *args: Any, what: Mapping[str, Any]) -> Any:
        """Is replaced by a canvas of any shape; that gets its arguments."""
        made = maybe_signature(what, app=app)
        return self.replace(made.clone(args) if args else made)

    @task(bind=True)
    def becomes_add(self: Task, left: int, right: int) -> Any:
        return self.replace(add.s(left, right))

    @task(bind=True)
    def becomes_chain(self: Task, *args: Any) -> Any:
        return self.replace(chain(identity.s(*args), identity.s()))

    @task(bind=True)
    def becomes_group(self: Task, numbers: list[int], number: int) -> Any:
        return self.replace(group(add.s(each, number) for each in numbers))

    @task(bind=True)
    def becomes_chord(self: Task, numbers: list[int], number: int) -> Any:
        return self.replace(chord([add.s(each, number) for each in numbers], total.s()))

    @task(bind=True)
    def becomes_celery_chord(self: Task, numbers: list[int], number: int) -> Any:
        return self.replace(celery_chord([add.s(each, number) for each in numbers], total.s()))

    @task(bind=True)
    def becomes_empty_chain(self: Task, *args: Any) -> Any:
        return self.replace(chain())

    @task(bind=True)
    def becomes_twice(self: Task, place: str, name: str, again: list[str]) -> Any:
        """A replacement of a replacement: into, into, …, out of, out of."""
        tell(place, f"into {name}")
        inner = becomes_twice.si(place, again[0], again[1:]) if again else note.si("innermost", place)
        return self.replace(inner | note.si(f"out of {name}", place))

    @task(bind=True)
    def becomes_failing(self: Task, *args: Any) -> Any:
        return self.replace(fail.si())

    # -- those that add to their chord ------------------------------------------------------------------

    @task(bind=True)
    def adds(self: Task, numbers: list[int], number: int) -> int:
        for each in numbers:
            self.add_to_chord(add.s(each, number))
        return 0

    @task(bind=True)
    def adds_chord(self: Task, numbers: list[int], number: int) -> int:
        self.add_to_chord(chord([add.s(each, number) for each in numbers], total.s()))
        return 0

    @task(bind=True)
    def adds_lazily(self: Task, numbers: list[int], number: int) -> int:
        """Of three that it could add, it adds the last."""
        lazy = [self.add_to_chord(add.s(each, number), lazy=True) for each in numbers]
        lazy[-1].delay()
        return 0

    return made


def make(broker: str, conf: Mapping[str, Any]) -> Celery:
    conf = dict(conf)
    app = Celery("canvas", broker=broker, set_as_current=False)
    replace = conf.pop("replace_celery_chord", False)
    app.conf.update(
        task_default_delivery_mode="transient", worker_hijack_root_logger=True, broker_connection_retry_on_startup=True
    )
    app.conf.update(conf)
    BatchTrack(app, replace_celery_chord=replace)
    return app


if "BATCHTRACK_TEST_BROKER_URL" in os.environ:  # or else somebody wants the canvases below alone
    app = make(os.environ["BATCHTRACK_TEST_BROKER_URL"], json.loads(os.environ.get("BATCHTRACK_TEST_CONF", "{}")))
    tasks = tasks_of(app)


# -- canvases -------------------------------------------------------------------------------------------


#: Makes a canvas of tasks and a chord class.
Make = Callable[[SimpleNamespace, Any], Any]

#: Canvases that end well: how they are made, and their result.
HEADERS: dict[str, tuple[Make, Any]] = {
    "a list": (lambda t, chord: chord([t.identity.s(at) for at in range(10)], t.identity.s()), list(range(10))),
    "a tuple": (lambda t, chord: chord((t.identity.s(2), t.identity.s(1)), t.identity.s()), [2, 1]),
    "a generator": (lambda t, chord: chord((t.identity.s(at) for at in range(10)), t.identity.s()), list(range(10))),
    "a group": (lambda t, chord: chord(group(t.identity.s(2), t.identity.s(1)), t.identity.s()), [2, 1]),
    "a group of a generator": (
        lambda t, chord: chord(group(t.identity.s(at) for at in range(5)), t.identity.s()), list(range(5)),
    ),
    "one task": (lambda t, chord: chord(t.identity.s(42), t.identity.s()), [42]),
    "one task in a list": (lambda t, chord: chord([t.add.s(2, 5)], t.identity.s()), [7]),
    "nothing": (lambda t, chord: chord([], t.identity.s()), []),
    "an empty group": (lambda t, chord: chord(group(), t.identity.s()), []),
    "chains": (
        lambda t, chord: chord([t.add.s(1, 2) | t.add.s(3), chain(t.identity.s(9)), t.identity.s(1)], t.identity.s()),
        [6, 9, 1],
    ),
    "one chain in a list": (lambda t, chord: chord([t.add.s(1, 2) | t.add.s(3)], t.identity.s()), [6]),
    "a chain, whose tasks it takes": (
        lambda t, chord: chord(t.identity.s(1) | t.identity.s(2), t.identity.s()), [1, 2],
    ),
    "a group within": (
        lambda t, chord: chord((group(t.identity.s(1), t.identity.s(2)), t.identity.s(3)), t.identity.s()), [1, 2, 3],
    ),
    "a chain that ends in a group": (
        lambda t, chord: chord(
            [chain(t.identity.s(42), group(t.identity.s(), t.add.s(1))), t.identity.s(0)], t.identity.s()
        ),
        [[42, 43], 0],
    ),
    "a chain with a group within": (
        lambda t, chord: chord(
            [chain(t.identity.s(1), group(t.add.s(1), t.add.s(2)), t.total.s()), t.identity.s(7)], t.identity.s()
        ),
        [5, 7],
    ),
    "chords": (
        lambda t, chord: chord(
            [chord([t.add.s(1, 2), t.add.s(3, 4)], t.add.s([5])), chord([t.add.s(6, 7)], t.add.s([10]))],
            t.identity.s(),
        ),
        [[3, 7, 5], [13, 10]],
    ),
    "a chord in a chord in a chord": (
        lambda t, chord: chord(
            [chord([chord([chord([t.add.s(1, 2)], t.add.s([3]))], t.add.s([4]))], t.add.s([5]))], t.add.s([6])
        ),
        [[[[3, 3], 4], 5], 6],
    ),
    "chains that end in chords": (
        lambda t, chord: chord(
            [chain(t.identity.si(at), chord([t.add.s(1), t.add.s(2)], t.total.s())) for at in range(2)], t.identity.s()
        ),
        [3, 5],
    ),
    "every shape": (
        lambda t, chord: chord(
            (
                t.identity.si(42),
                chain([t.identity.si(42)] * 12),
                group([t.identity.si(42)] * 12),
                chord([t.identity.si(42)] * 12, t.identity.si(1337)),
            ),
            t.identity.s(),
        ),
        [42, 42, *[42] * 12, 1337],
    ),
}  # fmt: skip

BODIES: dict[str, tuple[Make, Any]] = {
    "a chain": (lambda t, chord: chord([t.add.s(1, 2), t.add.s(3, 4)], t.total.s() | t.add.s(5) | t.add.s(6)), 21),
    "a chain of one": (lambda t, chord: chord(t.identity.si(42), chain(t.identity.s())), [42]),
    "a group": (
        lambda t, chord: chord([t.add.s(1, 2), t.add.s(3, 4)], group(t.total.s(), t.identity.s())), [10, [3, 7]],
    ),
    "a group of chains": (
        lambda t, chord: chord(
            [t.add.s(1, 2), t.add.s(3, 4)], group(t.total.s() | t.add.s(1), t.total.s() | t.add.s(2))
        ),
        [11, 12],
    ),
    "a chain that ends in a group": (
        lambda t, chord: chord([t.add.s(1, 2)], t.total.s() | group(t.add.s(1), t.add.s(2))), [4, 5],
    ),
    "a chain with a group within": (
        lambda t, chord: chord([t.add.s(1, 2)], chain(t.total.s(), group(t.add.s(1), t.add.s(2)), t.total.s())), 9,
    ),
    "a chord": (
        lambda t, chord: chord([t.add.s(1, 2), t.add.s(3, 4)], chord([t.total.s(), t.total.s()], t.total.s())), 20,
    ),
    "a chord whose body is a chord": (
        lambda t, chord: chord(
            [t.add.s(0, 1)],
            chord(
                [t.total.s(), t.total.s()],
                chain(t.total.s(), group(t.add.s(8), t.add.s(16)), t.total.s() | t.add.s(32)),
            ),
        ),
        60,
    ),
    "a chain with chords": (
        lambda t, chord: chord(
            [t.identity.s(1)], chain(t.total.s(), chord([t.add.s(1), t.add.s(2)], t.total.s()), t.add.s(10))
        ),
        15,
    ),
    "immutable": (lambda t, chord: chord([t.identity.si(1)], t.add.si(2, 2)), 4),
}  # fmt: skip

PLACES: dict[str, tuple[Make, Any]] = {
    "a group": (
        lambda t, chord: group(chord(group(t.add.s(1, 2), t.add.s(3, 4)), t.total.s()) for _ in range(2)), [10, 10],
    ),
    "a group of one": (lambda t, chord: group(chord((t.identity.si(42),), t.identity.s())), [[42]]),
    "a chain, last": (lambda t, chord: chain(t.identity.si(5), chord([t.add.s(1), t.add.s(2)], t.total.s())), 13),
    "a chain, first": (
        lambda t, chord: chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s()) | t.add.s(1) | t.add.s(2), 9,
    ),
    "a chain, within": (
        lambda t, chord: t.add.si(1, 0) | chord([t.add.s(1), t.add.s(1)], t.total.s()) | t.add.s(1), 5,
    ),
    "a chain of chords": (
        lambda t, chord: chain(
            chord([t.add.si(1, 0)] * 3, t.total.s()),
            *(chord([t.add.s(1)] * 3, t.total.s()) for _ in range(7)),
            chord([t.add.s(0)] * 3, t.total.s()),
        ),
        29520,
    ),
    "a chain of two chains of chords": (
        lambda t, chord: chain(
            *(chord([each, each], t.total.s()) for each in (t.add.si(1, 0), t.add.s(1), t.add.s(0)))
        ) | chain(*(chord([t.add.s(number)] * 2, t.total.s()) for number in (10, 0, 1))),
        178,
    ),
    "a chain, of chords with chains": (
        lambda t, chord: chain(
            t.identity.si(1),
            chord(
                [
                    t.identity.si(2),
                    chain(t.identity.si(3), chord([t.identity.si(4), t.identity.si(5)], t.identity.si(6))),
                ],
                t.identity.si(7),
            ),
        ),
        7,
    ),
}  # fmt: skip

#: Groups of Celery's own, or Celery's own chords, are in these: they need a result backend.
WITH_GROUPS: dict[str, tuple[Make, Any]] = {
    "a chain, before a group": (
        lambda t, chord: chain(chord([t.add.s(1, 1), t.add.s(2, 2)], t.total.s()), group(t.add.s(1), t.add.s(2))),
        [7, 8],
    ),
    "a chain, after a group": (
        lambda t, chord: chain(
            t.identity.si(1), group(t.add.s(1), t.add.s(2)), chord([t.total.s(), t.total.s()], t.total.s())
        ),
        10,
    ),
    "a chain, between groups": (
        lambda t, chord: chain(
            group(t.add.s(1, 0), t.add.s(2, 0)), chord([t.total.s(), t.total.s()], t.total.s()),
            group(t.add.s(1), t.add.s(2)),
        ),
        [7, 8],
    ),
}  # fmt: skip

REPLACED: dict[str, tuple[Make, Any]] = {
    "header, by a task": (lambda t, chord: chord([t.becomes_add.s(3, 4), t.add.s(1, 2)], t.identity.s()), [7, 3]),
    "header, by a chain": (lambda t, chord: chord(t.becomes_chain.si(42), t.identity.s()), [42]),
    "header, by a chain, first": (
        lambda t, chord: chord((t.becomes_chain.si(42), t.identity.s(1)), t.identity.s()), [42, 1],
    ),
    "header, by a chain, within": (
        lambda t, chord: chord((t.identity.s(1), t.becomes_chain.s(42), t.identity.s(2)), t.identity.s()), [1, 42, 2],
    ),
    "header, by a chain, last": (
        lambda t, chord: chord((t.identity.s(1), t.becomes_chain.s(42)), t.identity.s()), [1, 42],
    ),
    "header, by a group": (
        lambda t, chord: chord([t.becomes_group.s([1, 2], 4), t.identity.s(0)], t.identity.s()), [[5, 6], 0],
    ),
    "header, by a chord": (
        lambda t, chord: chord([t.becomes_chord.s([1, 2], 4), t.identity.s(0)], t.identity.s()), [11, 0],
    ),
    "chain in the header, first link": (
        lambda t, chord: chord([t.becomes_chain.si(1) | t.add.s(1), t.identity.s(0)], t.identity.s()), [2, 0],
    ),
    "chain in the header, link within": (
        lambda t, chord: chord([t.identity.s(1) | t.becomes_add.s(1) | t.add.s(1), t.identity.s(0)], t.identity.s()),
        [3, 0],
    ),
    "chain in the header, last link": (
        lambda t, chord: chord([t.identity.s([1, 2]) | t.becomes_group.s(1), t.identity.s(0)], t.identity.s()),
        [[2, 3], 0],
    ),
    "chain in the header, by a chord": (
        lambda t, chord: chord([t.identity.s([1, 2]) | t.becomes_chord.s(1) | t.add.s(1)], t.identity.s()), [6],
    ),
    "body, by a task": (lambda t, chord: chord([t.identity.s([1])], t.becomes_add.s([2])), [[1], 2]),
    "body, by a chain": (lambda t, chord: chord(t.identity.s(42), t.becomes_chain.s()), [42]),
    "body, by a group": (lambda t, chord: chord([t.add.s(1, 2), t.add.s(3, 4)], t.becomes_group.s(5)), [8, 12]),
    "body, by a chord": (lambda t, chord: chord([t.add.s(1, 2), t.add.s(3, 4)], t.becomes_chord.s(5)), 20),
    "body chain, first link": (lambda t, chord: chord(t.identity.s(42), t.becomes_chain.s() | t.identity.s()), [42]),
    "body chain, link within": (
        lambda t, chord: chord(t.identity.s(42), chain(t.identity.s(), t.becomes_chain.s(), t.identity.s())), [42],
    ),
    "body chain, last link": (lambda t, chord: chord(t.identity.s(42), t.identity.s() | t.becomes_chain.s()), [42]),
    "body chain, first link by a group": (
        lambda t, chord: chord([t.identity.s(1), t.identity.s(2)], t.becomes_group.s(1) | t.total.s()), 5,
    ),
    "body chain, last link by a chord": (
        lambda t, chord: chord([t.identity.s(1), t.identity.s(2)], t.identity.s() | t.becomes_chord.s(1)), 5,
    ),
    "nested chords": (
        lambda t, chord: chord(
            [
                chord([t.add.s(1, 2), t.becomes_add.s(3, 4)], t.becomes_group.s(5)) | t.total.s(),
                chord([t.becomes_add.s(6, 7), t.add.s(0, 0)], t.becomes_group.s(8)) | t.total.s(),
            ],
            t.becomes_group.s(9),
        ),
        [29, 38],
    ),
    "group of groups": (
        lambda t, chord: chord([t.becomes_group.s([2, 1], 1), t.becomes_group.s([4, 3], 1)] * 3, t.identity.s()),
        [[3, 2], [5, 4]] * 3,
    ),
}  # fmt: skip

#: How they come out is not told, but which they are.
ADDED: dict[str, tuple[Make, Any]] = {
    "tasks": (lambda t, chord: chord([t.adds.s([1, 2, 3], 4)], t.identity.s()), [0, 5, 6, 7]),
    "a chord": (lambda t, chord: chord([t.adds_chord.s([1, 2, 3], 4)], t.identity.s()), [0, 18]),
    "lazily": (lambda t, chord: chord([t.adds_lazily.s([1, 2, 3], 4)], t.identity.s()), [0, 7]),
    "from a chain": (lambda t, chord: chord([t.identity.s([1, 2]) | t.adds.s(4)], t.identity.s()), [0, 5, 6]),
}  # fmt: skip

#: Canvases in which a task raises `Expected`.
FAILURES: dict[str, Make] = {
    "the only header task": lambda t, chord: chord((t.fail.s(),), t.identity.s()),
    "a header task": lambda t, chord: chord([t.identity.s(1), t.fail.s(), t.identity.s(2)], t.identity.s()),
    "a header chain, before its end": lambda t, chord: chord(
        [chain(t.identity.si(1), t.fail.s(), t.identity.si(1))], t.identity.s()
    ),
    "a header chain, at its end": lambda t, chord: chord([chain(t.identity.si(1), t.fail.s())], t.identity.s()),
    "a header group": lambda t, chord: chord([group(t.identity.si(1), t.fail.s())], t.identity.s()),
    "a chain in the header, before a chord": lambda t, chord: chord(
        [t.identity.si(1), chain(t.fail.si(), chord([t.identity.si(2), t.identity.si(3)], t.identity.si(4)))],
        t.identity.s(),
    ),
    "a chord in the header": lambda t, chord: chord(
        [t.identity.s(1), chord([t.identity.s(1), t.fail.s()], t.identity.s())], t.identity.s()
    ),
    "the body of a chord in the header": lambda t, chord: chord([chord([t.identity.s(1)], t.fail.s())], t.identity.s()),
    "a header task that was replaced": lambda t, chord: chord([t.becomes_failing.s(), t.identity.s(1)], t.identity.s()),
    "the body": lambda t, chord: chord((t.identity.si(1),), t.fail.s()),
    "a body that was replaced": lambda t, chord: chord((t.identity.si(1),), t.becomes_failing.s()),
    "a body chain, before its end": lambda t, chord: chord(
        (t.identity.si(1),), chain(t.identity.si(1), t.fail.s(), t.identity.si(1))
    ),
    "a body chain, at its end": lambda t, chord: chord((t.identity.si(1),), chain(t.identity.si(1), t.fail.s())),
    "a body group": lambda t, chord: chord((t.identity.si(1),), group(t.identity.si(1), t.fail.s())),
    "the header of a body chord": lambda t, chord: chord((t.identity.si(1),), chord([t.fail.s()], t.identity.s())),
    "the body of a body chord": lambda t, chord: chord((t.identity.si(1),), chord([t.identity.s()], t.fail.s())),
    "the header, before a body chain": lambda t, chord: chord(
        [t.add.si(1, 1), t.fail.si()], chain(t.add.si(9, 7), t.add.si(5, 7))
    ),
    "the header, before a body group": lambda t, chord: chord(
        [t.add.si(1, 1), t.fail.si()], group(t.add.si(9, 7), t.add.si(5, 7))
    ),
    "the header, before a body chord": lambda t, chord: chord(
        [t.add.si(1, 1), t.fail.si()], chord([t.add.si(1, 1), t.add.si(2, 2)], t.add.si(10, 10))
    ),
    "the second of three chords in a chain": lambda t, chord: chain(
        chord([t.identity.si(1)] * 2, t.total.s()),
        chord([t.identity.s(), t.fail.s()], t.total.s()),
        chord([t.identity.s(), t.identity.s()], t.total.s()),
    ),
    "the link behind a chord": lambda t, chord: chord([t.identity.si(1)] * 2, t.total.s()) | t.fail.s() | t.add.s(1),
}
