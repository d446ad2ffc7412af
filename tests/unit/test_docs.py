"""The documentation does what it says: its tables are those of the code, its samples run, its links resolve.

Parts between ``<!-- generated: name -->`` and ``<!-- end generated -->`` are written by
``python -m tests.unit.test_docs``. A ``python`` block is run as a script in a folder of its own;
``<!-- setup: name -->`` before it puts a preamble before it, ``<!-- not executed: reason -->`` leaves it out.
``sql`` blocks are in `test_docs_sql`. The commands of a ``console`` block are run on a store with a crashed child;
``<!-- exit: 1 -->`` before it says with which exit code.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml
from celery.app.task import Task

from celery_batchtrack.store.schema import metadata
from celery_batchtrack.store.verify import CHECKS
from celery_batchtrack.store.views import VIEWS
from celery_batchtrack.surfaces import figures
from celery_batchtrack.vocabulary.crash_policy import CrashPolicy, Death, RowPolicy, judge
from celery_batchtrack.vocabulary.settings import PREFIX, Settings
from celery_batchtrack.vocabulary.states import (
    BATCH_ENDED,
    BATCH_TRANSITIONS,
    SETTLED,
    TRANSITIONS,
    BatchStatus,
    Cause,
    Detector,
    Status,
)
from tests.integration.cli_kit import invoke, make_app
from tests.unit.docs_scene import store_with_a_crash
from tests.unit.docs_views import views

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "celery_batchtrack"
DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
SCRIPT_TIMEOUT = 120


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- what is generated


def settings_table() -> str:
    lines = ["| setting | default | unit | meaning | environment |", "|---|---|---|---|---|"]
    defaults = Settings()
    for each in fields(Settings):
        name = PREFIX + each.name
        default = _default(getattr(defaults, each.name))
        environment = "" if each.name in ("engine_options", "retention") else f"`{name.upper()}`"
        lines.append(f"| `{name}` | {default} | {each.metadata['unit']} | {each.metadata['doc']} | {environment} |")
    return "\n".join(lines)


def _default(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_default(each)}" for key, each in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:g}" if value < 1e6 else f"{int(value)}"
    return str(value).lower()


def child_states() -> str:
    drawn = [(source, each.target, each.name) for each in TRANSITIONS for source in each.sources]
    return _diagram(drawn, Status.PENDING, SETTLED)


def batch_states() -> str:
    drawn = [
        (source, target, each.name) for each in BATCH_TRANSITIONS for source in each.sources for target in each.targets
    ]
    return _diagram(drawn, BatchStatus.OPEN, BATCH_ENDED)


def child_life() -> str:
    """Who follows whom, without the names of the transitions."""
    return _life(child_states())


def batch_life() -> str:
    return _life(batch_states())


def _life(diagram: str) -> str:
    """Each arrow once."""
    return "\n".join(dict.fromkeys(line.partition(": ")[0] for line in diagram.splitlines()))


def _diagram(drawn: list[tuple[str, str, str]], start: str, ends: tuple[str, ...]) -> str:
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {start}"]
    lines += [f"    {source} --> {target}: {name}" for source, target, name in drawn]
    lines += [f"    {end} --> [*]" for end in ends]
    return "\n".join([*lines, "```"])


def as_acks() -> str:
    """Asked of the policy itself, for every combination that differs."""
    tasks: list[tuple[str, dict[str, bool]]] = [
        ("nothing", {}),
        ("`reject_on_worker_lost`", {"reject_on_worker_lost": True}),
        ("`acks_late`", {"acks_late": True}),
        ("`acks_late`, `reject_on_worker_lost`", {"acks_late": True, "reject_on_worker_lost": True}),
        ("`acks_late`, `acks_on_timeout=False`", {"acks_late": True, "acks_on_timeout": False}),
        ("all three", {"acks_late": True, "reject_on_worker_lost": True, "acks_on_timeout": False}),
        ("`retry_on_worker_lost`", {"retry_on_worker_lost": True}),
    ]
    deaths = [
        ("its process died (`signal`, `exit`)", Cause.SIGNAL),
        ("its worker is lost", Cause.WORKER_LOST),
        ("hard time limit", Cause.TIME_LIMIT),
    ]
    lines = ["| the task says | " + " | ".join(text for text, _ in deaths) + " |", "|---" * (len(deaths) + 1) + "|"]
    for text, flags in tasks:
        said = {
            "acks_late": False, "reject_on_worker_lost": False, "retry_on_worker_lost": False,
            "acks_on_timeout": True, **flags,
        }  # fmt: skip
        policy = RowPolicy.resolve(CrashPolicy("as_acks"), 3, **said)
        again = [judge(policy, Death(cause)).runs_again for _, cause in deaths]
        lines.append(f"| {text} | " + " | ".join("yes" if each else "no" for each in again) + " |")
    return "\n".join(lines)


def checks() -> str:
    return "\n".join(f"- `{name}`" for name in CHECKS)


def metrics() -> str:
    lines = ["| metric | kind | labels | |", "|---|---|---|---|"]
    for each in figures.ALL:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        lines.append(f"| `{figures.PREFIX}{each.name}` | {each.kind} | {labels} | {each.help} |")
    return "\n".join(lines)


def alerts() -> str:
    lines = ["| alert | severity | means | what to do |", "|---|---|---|---|"]
    for rule in yaml.safe_load((ROOT / "docs/monitoring/alerts.yml").read_text())["groups"][0]["rules"]:
        told = rule["annotations"]
        lines.append(
            f"| `{rule['alert']}` | {rule['labels']['severity']} | {told['description']} | {told['runbook']} |"
        )
    return "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {
    each.__name__: each
    for each in (child_states, batch_states, child_life, batch_life, as_acks, checks, metrics, alerts, views)
} | {"settings": settings_table}

_GENERATED = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)


def regenerated(text: str) -> str:
    return _GENERATED.sub(lambda match: f"{match[1]}{GENERATED[match[2]]()}\n{match[4]}", text)


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_generated_parts_are_those_of_the_code(path: Path) -> None:
    text = path.read_text()
    assert text == regenerated(text), "run `python -m tests.unit.test_docs`"


def test_every_generated_part_is_somewhere() -> None:
    found = [match[2] for path in DOCUMENTS for match in _GENERATED.finditer(path.read_text())]
    assert sorted(found) == sorted(GENERATED)


# -- blocks of code


@dataclass(frozen=True)
class Block:
    path: Path
    line: int
    language: str
    code: str
    remark: str  # the HTML comment right before it

    def __str__(self) -> str:
        return f"{shown(self.path)}:{self.line}"


_FENCE = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[Block]:
    return list(_blocks(language))


def _blocks(language: str) -> Iterator[Block]:
    for path in DOCUMENTS:
        text = path.read_text()
        for match in _FENCE.finditer(text):
            if match[2] == language:
                line = text.count("\n", 0, match.start(3)) + 1
                yield Block(path, line, match[2], match[3], match[1] or "")


_APP = """
from celery import Celery
import celery_batchtrack as _batchtrack

app = Celery("shop", task_always_eager=True)
_batchtrack.BatchTrack(app)

fixed = []

@app.task
@_batchtrack.tracked(items="ids")
def index(ids):
    if 13 in ids and 13 not in fixed:
        raise ValueError("13 is not indexed")
    return len(ids)

@app.task
def merge(results):
    return sum(results)

@app.task
def merge_one(result):
    return result

@app.task
def double(result):
    return 2 * result

@app.task
def alert(report):
    assert report["status"]

@app.task
def bill(report):
    assert report["status"]

@app.task
def log_error(request, exception, traceback):
    pass
"""
_BATCH = """
batch_id = _batchtrack.Batch.create("sample", [index.s([1]), index.s([13])], tolerance=1).id
"""
SETUPS = {"": "", "app": _APP, "batch": _APP + _BATCH}


def runnable() -> list[Block]:
    return [each for each in blocks("python") if not each.remark.startswith("not executed:")]


@pytest.mark.parametrize("block", runnable(), ids=str)
def test_every_python_sample_runs(block: Block, tmp_path: Path) -> None:
    setup = block.remark.removeprefix("setup:").strip()
    assert setup in SETUPS, f"{block}: no setup {setup!r}"
    name = re.match(r"# (\w+\.py)\n", block.code)
    script = tmp_path / (name[1] if name else "sample.py")
    script.write_text(SETUPS[setup] + block.code)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BATCHTRACK_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, script.name], cwd=tmp_path, env=environment, text=True, timeout=SCRIPT_TIMEOUT,
        stdin=subprocess.DEVNULL, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    if script.name == "tasks.py":
        assert "\n90\n" in f"\n{done.stdout}" and "SIGSEGV" in done.stdout, done.stdout


def test_what_is_left_out_says_why() -> None:
    for block in blocks("python"):
        assert not block.remark.startswith("not executed") or re.match(r"not executed: \w+", block.remark), block


def test_tables_are_named_as_they_are() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"^\| `(batchtrack_\w+)`", text, re.MULTILINE))
    assert named == set(metadata.tables)


# -- commands, links, names


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[object, str]]:
    """An app on a store with a crashed child, and its batch's id."""
    url = f"sqlite:///{tmp_path_factory.mktemp('shop') / 'x.db'}"
    store, batch_id = store_with_a_crash(url)
    app = make_app(url)

    @app.task(name="shop.tasks.bare", shared=False)
    def bare() -> None: ...

    app.finalize()
    app.tasks["shop.tasks.bare"].__class__ = Task  # for `doctor` to find
    yield app, str(batch_id)
    store.dispose()


@pytest.mark.parametrize("block", blocks("console"), ids=str)
def test_every_command_of_a_console_block_runs_and_has_the_columns_that_are_shown(
    block: Block, shop: tuple[object, str]
) -> None:
    app, batch_id = shop
    code = int(block.remark.removeprefix("exit:") or 0)
    commands = re.findall(r"^\$ celery -A shop batchtrack (.*)\n((?:[^$].*\n)*)", block.code, re.MULTILINE)
    assert commands, block
    for command, shown_output in commands:
        arguments = shlex.split(command.replace("ID", batch_id))
        said = invoke(app, *arguments, code=code).stdout
        for line in shown_output.splitlines()[:1]:
            if line.isupper():
                assert said.split("\n")[0].split() == line.split(), block
            else:
                assert said.split("=")[0] == line.split("=")[0] or said[:4] == line[:4], block


def test_every_check_of_doctor_is_explained() -> None:
    code = "\n".join(path.read_text() for path in (PACKAGE / "surfaces" / "doctor").glob("checks_*.py"))
    named = set(re.findall(r"\b(?:ok|warn|fail|level)\(\s*\"([a-z_ ]+)\"", code))
    section = (ROOT / "docs" / "command-line.md").read_text().partition("## doctor")[2].partition("\n## ")[0]
    assert named == set(re.findall(r"^\| `([a-z_ ]+)` \|", section, re.MULTILINE))


def everything() -> str:
    return "\n".join(path.read_text() for path in DOCUMENTS)


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    # `make x` in running text, or at the start of a line in a block.
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", everything(), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_every_relative_link_resolves(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), f"{shown(path)} links to {target}"
        if anchor:
            assert anchor in _anchors(file), f"{shown(path)} links to {target}"


def _anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_subcommand_and_option_exists() -> None:
    from celery_batchtrack.surfaces.cli import batchtrack

    samples = re.findall(r"celery -A \S+ batchtrack ([a-z][\w-]*)([^`\n#]*)", everything())
    assert samples
    for command, rest in samples:
        assert command in batchtrack.commands, f"`batchtrack {command}` is no command"
        if batchtrack.commands[command].context_settings.get("ignore_unknown_options"):
            continue  # they are another program's
        options = {name for each in batchtrack.commands[command].params for name in each.opts}
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in options, f"`batchtrack {command}` has no option {option}"
    for name in re.findall(r"`batchtrack (\w+)`", everything().partition("## Status")[0]):
        assert name in batchtrack.commands, f"`batchtrack {name}` is no command"


def test_every_module_has_its_line_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`(\w+\.py)`", text))
    modules = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if "migrations" not in path.parts and (path.name != "__init__.py" or path.parent == PACKAGE)
    }
    assert modules - named == set(), "in the package, but not in ARCHITECTURE.md"
    assert named - modules == set(), "in ARCHITECTURE.md, but not in the package"


def test_every_cause_and_detector_is_explained() -> None:
    text = (ROOT / "docs" / "crashes.md").read_text()
    for name in (*Cause, *Detector):
        assert f"`{name}`" in text, name


def test_every_test_that_a_guarantee_names_is_there() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    table = text.partition("## Their limits")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "::" in line]
    assert len(rows) == table.count("\n| ") - 1, "a guarantee without a test"
    for path, name in re.findall(r"`(tests/\S+?)::(\w+)`", table):
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path} has no {name}"


def test_every_log_action_is_explained() -> None:
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    logged = set(re.findall(r"\baction=([a-z_]+)", code))
    section = (ROOT / "docs" / "operations.md").read_text().partition("## Reading the log")[2].partition("\n## ")[0]
    first_cells = "\n".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    explained = set(re.findall(r"`(\w+)`", first_cells))
    assert logged == explained


def test_every_setting_that_is_named_exists() -> None:
    known = {PREFIX + each for each in Settings.names()}
    relations = {*metadata.tables, *(each.relation for each in VIEWS.values())}
    tables = {*relations, "batchtrack_alembic_version", "batchtrack_reader"}
    for name in re.findall(r"\b(?:CELERY_)?(BATCHTRACK_[A-Z]\w*|batchtrack_[a-z]\w*)\b", everything()):
        assert name.lower() in known | tables, f"{name} is no setting"


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(regenerated(document.read_text()))
