"""LocalCluster: real processes, and none of them left afterwards."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from celery import Celery

from celery_batchtrack.errors import ClusterError
from celery_batchtrack.glue.embedded import cluster as cluster_module
from celery_batchtrack.glue.embedded.cluster import LocalCluster, locate, runtime_settings

ROOT = Path(__file__).resolve().parents[2]
MARK = "LOCAL_CLUSTER_TEST"

APP = """
import os, time
from pathlib import Path
from celery import Celery

HERE = Path({folder!r})
app = Celery({name}broker=f"batchtrack+filesystem://{{HERE}}/broker")
app.conf.task_ignore_result = True

@app.task
def note(text):
    (HERE / text).touch()

@app.task
def note_setting(name):
    (HERE / f"{{name}}={{app.conf.get(name)}}").touch()

@app.task
def sleep(name):
    (HERE / name).touch()
    time.sleep(60)

@app.task
def hold_interpreter_lock(name):
    import ctypes
    (HERE / name).touch()
    ctypes.PyDLL(None).sleep(60)

@app.task
def start_process(name):
    import subprocess
    subprocess.Popen(["sleep", "60"])
    (HERE / name).touch()
"""

MAIN = """
import sys
from celery_batchtrack.glue.embedded.cluster import LocalCluster

if __name__ == "__main__":
    with LocalCluster(app, processes=2, detector=False, stop_timeout=1):
        {block}
"""

RUN_ONE = """
        import time
        note.delay("ran")
        while not (HERE / "ran").exists():
            time.sleep(0.02)
"""


def wait_until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return value


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A word in the environment of everything a test starts; at the end nothing with it may live."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(MARK, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # Celery's, about running as root
    yield value
    left = marked(value)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert not left


def marked(value: str) -> list[psutil.Process]:
    """Living processes with the mark, this one excepted."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == value:
                found.append(process)
    return found


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str) -> Iterator[ModuleType]:
    """An importable module with an application and tasks; its workers leave files in ``shop.HERE``."""
    name = f"shop_{mark[:8]}"
    (tmp_path / f"{name}.py").write_text(APP.format(folder=str(tmp_path), name=f"{name!r}, "))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)
    yield module
    module.app.close()
    del sys.modules[name]


@contextlib.contextmanager
def cluster_of(shop: ModuleType, **options: Any) -> Iterator[LocalCluster]:
    with LocalCluster(
        shop.app, **{"processes": 2, "detector": False, "stop_timeout": 2, **options}
    ) as cluster:
        yield cluster


def write_script(path: Path, block: str, app: str = "'shop', ") -> Path:
    source = APP.format(folder=str(path.parent), name=app) + MAIN.format(block=block.strip())
    path.write_text(source)
    return path


def start(*argv: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *argv], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(*argv: str, cwd: Path) -> str:
    with start(*argv, cwd=cwd) as script:
        output = script.communicate(timeout=60)[0]
    assert script.returncode == 0, output
    return output


def ran(shop: ModuleType, name: str) -> None:
    wait_until(lambda: (shop.HERE / name).exists())


# -- work gets done


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_tasks_run_in_the_block_and_nothing_is_left_after_it(shop: ModuleType, mark: str, pool: str) -> None:
    with cluster_of(shop, pool=pool):
        for n in range(20):
            shop.note.delay(f"n{n}")
        for n in range(20):
            ran(shop, f"n{n}")
        assert marked(mark)
    assert not marked(mark)


@pytest.mark.parametrize("name", ["'shop', ", "", "'__main__', "])
def test_an_application_in_the_main_script_works(tmp_path: Path, mark: str, name: str) -> None:
    script = write_script(tmp_path / "script.py", RUN_ONE, name)
    assert run(script.name, cwd=tmp_path) == ""
    assert (tmp_path / "ran").exists()


def test_python_dash_m_works(tmp_path: Path, mark: str) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "constants.py").write_text("A = 1\n")
    path = write_script(package / "mod.py", RUN_ONE)
    path.write_text("from .constants import A\n" + path.read_text())
    assert run("-m", "pkg.mod", cwd=tmp_path) == ""
    assert (package / "ran").exists()


def test_tasks_of_other_modules_than_the_application_s_are_known(shop: ModuleType, tmp_path: Path) -> None:
    other = f"{shop.__name__}_other"
    (tmp_path / f"{other}.py").write_text(
        f"from {shop.__name__} import app, HERE\n@app.task\ndef other():\n    (HERE / 'other').touch()\n"
    )
    module = importlib.import_module(other)
    with cluster_of(shop):
        module.other.delay()
        ran(shop, "other")
    del sys.modules[other]


def test_settings_made_at_run_time_reach_the_worker_unseen(shop: ModuleType, mark: str) -> None:
    shop.app.conf.broker_url = f"batchtrack+filesystem://{shop.HERE}/another-broker"
    shop.app.conf.update(batchtrack_word="pass-word")
    with cluster_of(shop):
        shop.note_setting.delay("batchtrack_word")
        ran(shop, "batchtrack_word=pass-word")
        assert not (shop.HERE / "broker").exists()
        for process in marked(mark):
            assert "pass-word" not in " ".join([*process.cmdline(), *process.environ().values()])


def test_only_plain_settings_are_passed_on() -> None:
    app = Celery("plain", broker="memory://", set_as_current=False)
    app.conf.update(
        batchtrack_a={"b": [1, None, "x", (2.0, True)]}, batchtrack_c=object(), batchtrack_d={1: 2}
    )
    settings = runtime_settings(app)
    assert settings["broker_url"] == "memory://"
    assert settings["batchtrack_a"] == {"b": [1, None, "x", (2.0, True)]}
    assert not settings.keys() & {"batchtrack_c", "batchtrack_d", "deprecated_settings"}


def test_queues_node_name_and_log_file(shop: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "cluster.log"
    options = {"queues": ["a", "b"], "node": "n@here", "logfile": log, "loglevel": "INFO"}
    with cluster_of(shop, **options, extra_args=["--without-heartbeat"]) as cluster:
        assert cluster.node == "n@here"
        shop.note.apply_async(["ran"], queue="b")
        ran(shop, "ran")
        assert list(shop.app.control.inspect(timeout=5, limit=1).ping()) == ["n@here"]
    assert "n@here ready" in log.read_text()


DETECTOR = """
if os.environ.get("BATCHTRACK_CLUSTER_PROCESS") == str(os.getpid()):
    import sys, types

    class BatchTrack:
        def __init__(self, its_app=None):
            # Other modules with tasks may be imported too: tasks are shared among the apps of a test process.
            pass

        @classmethod
        def of(cls, its_app):
            assert its_app is app
            return cls()

        def detect_forever(self, stop):
            (HERE / f"detecting {os.getpid()}").touch()
            stop.wait()
            (HERE / "stopped").touch()

    sys.modules["celery_batchtrack.glue.extension"] = types.ModuleType("extension")
    sys.modules["celery_batchtrack.glue.extension"].BatchTrack = BatchTrack
    sys.modules["celery_batchtrack.glue.extension"].INSTALLERS = []
"""


def test_the_detector_runs_in_a_process_of_its_own_and_is_asked_to_stop(
    shop: ModuleType, tmp_path: Path, mark: str
) -> None:
    with (tmp_path / f"{shop.__name__}.py").open("a") as file:
        file.write(DETECTOR)
    with cluster_of(shop, detector=True):
        (first,) = wait_until(lambda: list(tmp_path.glob("detecting *")))
        os.kill(int(first.name.split()[1]), signal.SIGKILL)
        wait_until(lambda: len(list(tmp_path.glob("detecting *"))) == 2)
        assert not (tmp_path / "stopped").exists()
    assert (tmp_path / "stopped").exists()
    assert not marked(mark)


# -- nothing is left


def test_nothing_is_left_after_an_exception(shop: ModuleType, mark: str) -> None:
    with pytest.raises(ZeroDivisionError), cluster_of(shop):
        raise ZeroDivisionError
    assert not marked(mark)


def test_what_does_not_end_in_time_is_killed(shop: ModuleType, mark: str) -> None:
    with cluster_of(shop, stop_timeout=0.5):
        shop.sleep.delay("begun")
        ran(shop, "begun")
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    assert not marked(mark)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("task", ["sleep", "hold_interpreter_lock", "start_process"])
def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path, mark: str, task: str, pool: str) -> None:
    block = f"{task}.delay('begun'); time.sleep(60)"
    script = write_script(tmp_path / "script.py", block)
    script.write_text(script.read_text().replace("processes=2", f"processes=2, pool={pool!r}"))
    with start(script.name, cwd=tmp_path) as parent:
        wait_until(lambda: (tmp_path / "begun").exists() or parent.poll() is not None)
        assert len(marked(mark)) >= 2
        parent.kill()
        parent.wait()
        wait_until(lambda: not marked(mark), 5)


def test_a_fork_of_the_parent_does_not_keep_the_workers_alive(tmp_path: Path, mark: str) -> None:
    block = """import os, time
        if os.fork() == 0:
            time.sleep(60)
        (HERE / "begun").touch()
        time.sleep(60)"""
    script = write_script(tmp_path / "script.py", block)
    with start(script.name, cwd=tmp_path) as parent:
        wait_until(lambda: (tmp_path / "begun").exists())
        forked = [p for p in psutil.Process(parent.pid).children() if "script.py" in p.cmdline()]
        assert len(forked) == 1
        parent.kill()
        parent.wait()
        wait_until(lambda: marked(mark) == forked, 5)
        forked[0].kill()
        wait_until(lambda: not marked(mark), 5)


def test_an_interrupt_reaches_the_parent_alone(tmp_path: Path, mark: str) -> None:
    block = "sleep.delay('begun'); (HERE / 'waiting').touch(); time.sleep(60)"
    script = write_script(tmp_path / "script.py", block)
    with subprocess.Popen(
        [sys.executable, script.name], cwd=tmp_path, start_new_session=True, stdin=subprocess.PIPE, stderr=-1,
        # A shell's background job, such as a CI run, inherits an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as parent:
        wait_until(lambda: (tmp_path / "begun").exists() and (tmp_path / "waiting").exists())
        os.killpg(parent.pid, signal.SIGINT)
        error = parent.communicate(timeout=20)[1]
    assert b"KeyboardInterrupt" in error and b"WorkerLost" not in error
    assert not marked(mark)


# -- death and failure


def test_a_killed_worker_is_started_again(shop: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), cluster_of(shop) as cluster:
        for n in range(2):
            before = cluster.worker_pid
            cluster.kill_worker()
            cluster.wait_ready(timeout=20)
            assert cluster.worker_pid != before
            shop.note.delay(f"n{n}")
            ran(shop, f"n{n}")
    assert "died: signal 9 (SIGKILL); restart in 0.2 s" in caplog.text
    assert "restart in 0.4 s" in caplog.text


def test_without_restart_a_dead_worker_stays_dead(shop: ModuleType, mark: str) -> None:
    with cluster_of(shop, restart=False) as cluster:
        cluster.kill_worker()
        with pytest.raises(ClusterError, match=r"signal 9 \(SIGKILL\)"):
            cluster.wait_ready()
        assert not marked(mark)


def test_an_unusable_broker_folder_is_reported_at_once(shop: ModuleType, tmp_path: Path, mark: str) -> None:
    (tmp_path / "file").touch()
    shop.app.conf.broker_url = f"batchtrack+filesystem://{tmp_path}/file/below"
    begin = time.monotonic()
    with (
        pytest.raises(
            ClusterError, match=r"(?s)worker process ended with .*cannot use its folder.*broker_url"
        ),
        cluster_of(shop),
    ):
        pass
    assert time.monotonic() - begin < 10
    assert not marked(mark)


def test_an_application_that_no_module_holds_is_refused() -> None:
    with pytest.raises(ClusterError, match="module-level variable"):
        LocalCluster(Celery("nowhere", set_as_current=False)).start()


def test_a_cluster_in_an_unguarded_main_script_is_refused_in_its_processes(tmp_path: Path, mark: str) -> None:
    script = write_script(tmp_path / "script.py", "pass")
    script.write_text(script.read_text().replace('if __name__ == "__main__":', "if True:"))
    with start(script.name, cwd=tmp_path) as parent:
        output = parent.communicate(timeout=30)[0]
    assert parent.returncode == 1
    assert "while loading the main script" in output


def test_the_module_with_the_application_is_preferred_to_the_main_script(shop: ModuleType) -> None:
    main = sys.modules["__main__"]
    main.borrowed = shop.app  # type: ignore[attr-defined]
    try:
        assert (locate(shop.app)["module"], locate(shop.app)["attribute"]) == (shop.__name__, "app")
    finally:
        del main.borrowed  # type: ignore[attr-defined]


def test_exits_are_described_by_name() -> None:
    assert cluster_module.describe_exit(1) == "exit status 1"
    assert cluster_module.describe_exit(-11) == "signal 11 (SIGSEGV)"
    assert cluster_module.describe_exit(None) == "an unknown exit status"
