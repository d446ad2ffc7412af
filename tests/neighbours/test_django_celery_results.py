"""django-celery-results: its rows are those of ordinary tasks and of bodies; of children, if a batch asks for it."""

from __future__ import annotations

from pathlib import Path

from tests.neighbours.kit import Neighbour


def test_rows_are_as_ever_and_children_have_them_where_asked_for(tmp_path: Path) -> None:
    scene = Neighbour(tmp_path, "results")
    scene.more = {"SHOP_DATABASE": str(tmp_path / "shop.db")}
    scene.scripts(setup=[])
    with scene.worker():
        assert scene.scripts(run=[])["run"] == {
            "ordinary": 2,
            "body": 6,
            "row of an ordinary task": ["SUCCESS", "2"],
            "row of a body": ["SUCCESS", "6"],
            "rows of children": [None, None],
            "rows of children with results=backend": [["SUCCESS", "6"]],
        }
    scene.close()
