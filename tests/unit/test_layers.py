"""The layers of ARCHITECTURE.md, read from the source: imports go down only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "celery_batchtrack"
NAME = PACKAGE.name
#: From the ground up. What is not named here belongs to the glue: the package's own face, its signals.
LAYERS = {"errors": 0, "vocabulary": 0, "store": 1, "behaviour": 2, "surfaces": 4, "flower_plugin": 4}
GLUE = 3
LAYER_NAMES = ("vocabulary", "store", "behaviour", "glue", "surfaces")
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "migrations/versions" not in path.as_posix())

#: Library → the lowest layer that may know it.
ALLOWED_FROM = {"celery": GLUE, "kombu": GLUE, "billiard": GLUE, "vine": GLUE, "click": GLUE}
ONLY_IN_STORE = ("sqlalchemy", "alembic", "psycopg", "sqlite3")


def _module(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def _layer(module: tuple[str, ...]) -> int:
    return LAYERS.get(module[1], GLUE) if len(module) > 1 else GLUE


def _imports(tree: ast.AST, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[str, ...]]:
    """Every imported module or name, absolute, those in functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base: tuple[str, ...] = ()
            if node.level:
                package = module if is_package else module[:-1]
                base = package[: len(package) - node.level + 1]
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def _found(path: Path) -> list[tuple[str, ...]]:
    return list(_imports(ast.parse(path.read_text()), _module(path), path.name == "__init__.py"))


def test_the_layer_test_sees_the_package() -> None:
    assert len(SOURCES) > 30
    assert {_layer(_module(path)) for path in SOURCES} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_layer_imports_go_down_only(path: Path) -> None:
    own = _layer(_module(path))
    upwards = [
        ".".join(target) for target in _found(path)
        if target[0] == NAME and _layer(target) > own and target != (NAME, "__version__")
    ]  # fmt: skip
    assert upwards == [], f"{LAYER_NAMES[own]} imports what lies above it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_layer_libraries_stay_where_they_belong(path: Path) -> None:
    own = _layer(_module(path))
    roots = {target[0] for target in _found(path)}
    for library, lowest in ALLOWED_FROM.items():
        assert library not in roots or own >= lowest, f"{library} in {LAYER_NAMES[own]}"
    for library in ONLY_IN_STORE:
        assert library not in roots or own == LAYERS["store"], f"{library} in {LAYER_NAMES[own]}"


def test_layer_of_the_vocabulary_needs_the_standard_library_only() -> None:
    import sys

    for path in SOURCES:
        if _layer(_module(path)) == 0:
            foreign = {target[0] for target in _found(path)} - set(sys.stdlib_module_names) - {NAME}
            assert foreign == set(), path


# -- one place writes `status` ---------------------------------------------------------------------


def _status_writes(source: str) -> list[int]:
    """Lines that change a status: `update(…).values(status=…)`, `change(…, status=…)`, `values["status"] = …`,
    or `SET status` in SQL. A new row's first status, in an INSERT, is no change."""
    return sorted({line for node in ast.walk(ast.parse(source)) for line in _written(node)})


def _written(node: ast.AST) -> Iterator[int]:
    if isinstance(node, ast.Call):
        named = any(keyword.arg == "status" for keyword in node.keywords)
        literal = any(_has_status(argument) for argument in node.args)
        callee = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if (named or literal) and callee == "values" and _starts_with_update(node.func):
            yield node.lineno
        if named and callee in ("change", "change_batch", "update"):
            yield node.lineno
    elif isinstance(node, ast.Assign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            if isinstance(target, ast.Subscript) and ast.unparse(target.slice) == "'status'":
                yield node.lineno
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "set status" in node.value.lower():
        yield node.lineno


def _has_status(node: ast.AST) -> bool:
    return isinstance(node, ast.Dict) and any(
        isinstance(key, ast.Constant) and key.value == "status" for key in node.keys
    )


def _starts_with_update(node: ast.AST) -> bool:
    """Whether a chain such as `sa.update(child).where(…).values` begins with an UPDATE."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            callee = part.func
            if (callee.attr if isinstance(callee, ast.Attribute) else getattr(callee, "id", "")) == "update":
                return True
    return False


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if _layer(_module(path)) in (LAYERS["store"], LAYERS["behaviour"])],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_layer_store_writes_status_in_its_transitions_only(path: Path) -> None:
    written = _status_writes(path.read_text())
    if path.relative_to(PACKAGE).as_posix() == "store/transitions.py":
        assert written, "this test looks past what it should see"
    else:
        assert written == []


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("sa.update(child).where(x).values(status='failed')", True),
        ("update(child).values({'status': 'failed'})", True),
        ("change(CLAIM, at(key), status='failed')", True),
        ("values['status'] = 'failed'", True),
        ("sa.text('UPDATE child SET status = 1')", True),
        ("sa.insert(child).values(status='pending')", False),
        ("sa.update(child).values(cause='x')", False),
    ],
)
def test_layer_test_of_status_catches_every_way_to_write_it(source: str, caught: bool) -> None:
    assert bool(_status_writes(source)) is caught
