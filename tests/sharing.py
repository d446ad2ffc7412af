"""A pytest plugin: several runs of the same tests share them out between them, file by file, as each gets on.

All are given one folder by `--share`, and note there what they took. With what it takes first, each says what it
prefers: that is the order of its arguments.
"""

from __future__ import annotations

from pathlib import Path

import pytest

#: Their tests have something in common that takes long to make.
AS_ONE = ("tests/django/",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=Path, metavar="FOLDER", help="run what no other run with this folder took yet")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--share")
    if folder is not None:
        config.pluginmanager.register(Share(folder))


class Share:
    """What one run takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ours: dict[str, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """As pytest's own, but for what others take: to tell which test comes next, it takes that before."""
        if session.testsfailed or session.config.option.collectonly:
            return None  # pytest says so
        upcoming = (item for item in session.items if self._is_ours(item))
        item = next(upcoming, None)
        while item is not None:
            following = next(upcoming, None)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            item = following
        return True

    def _is_ours(self, item: pytest.Item) -> bool:
        file = item.nodeid.partition("::")[0]
        part = next((folder for folder in AS_ONE if file.startswith(folder)), file)
        if part not in self._ours:
            self._ours[part] = self._take(part)
        return self._ours[part]

    def _take(self, part: str) -> bool:
        try:
            (self.folder / part.replace("/", ".")).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
