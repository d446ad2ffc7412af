"""Templates: ours by name, Flower's for the rest, and one more tab in Flower's navigation."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from tornado.template import Loader, Template

logger = logging.getLogger("celery_batchtrack")

FOLDER = Path(__file__).parent / "templates"
#: Flower's own tab that ours is made like, whatever that looks like in its version.
_BROKER = re.compile(r"<li\b[^>]*>(?:(?!</li>).)*reverse_url\('broker'\).*?</li>", re.DOTALL)


class PluginLoader(Loader):
    """Of the folder of Flower's templates, with ours before them."""

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:
        return name

    def _create_template(self, name: str) -> Template:
        own = FOLDER / name
        source = (own if own.is_file() else Path(self.root, name)).read_text("utf-8")
        if name == "navbar.html":
            source = with_tab(source)
        return Template(source, name=name, loader=self)


def with_tab(source: str) -> str:
    """Flower's navigation with the tab of batches behind that of the broker."""
    found = _BROKER.search(source)
    if found is None:
        logger.warning("action=flower_no_tab Flower's navigation has changed: the pages are at /batches, without a tab")
        return source
    return source[: found.end()] + "\n" + _ours(found[0]) + source[found.end() :]


def _ours(broker: str) -> str:
    changed = broker.replace("reverse_url('broker')", "reverse_url('bt_batches')")
    return changed.replace("active_tab == 'broker'", "active_tab == 'batches'").replace(">Broker<", ">Batches<")


def loader_for(settings: dict[str, Any]) -> PluginLoader:
    return PluginLoader(settings["template_path"])
