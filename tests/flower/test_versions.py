"""Every supported version of Flower, started the two ways that there are."""

from __future__ import annotations

import re
import uuid

import pytest

from celery_batchtrack.store import Store
from tests.flower import processes, scenes
from tests.flower.kit import BASIC
from tests.flower.processes import Running
from tests.helpers import eventually

Flowers = dict[str, Running]


@pytest.mark.parametrize("version", list(processes.VERSIONS))
def test_pages_actions_and_api_on_every_version(flowers: Flowers, rich: scenes.Rich, version: str) -> None:
    running = flowers[version]
    site = running.site
    if version != processes.NEWEST:
        assert processes.version_of(processes.installed(version)) == version
    if running.password:
        assert site.get("/batches").status == 401
        site.headers.update(BASIC)
    tab = re.search(r'<a [^>]*href="([^"]*)"[^>]*>\s*Batches', site.get("/workers").text)
    assert tab is not None and tab[1] == f"{site.prefix}/batches"
    batch, child = f"/batch/{rich.invoices}", f"/batch/{rich.invoices}/{rich.crashed}"
    lists = ("/batches", "/batches/crashes", "/batches/workers", "/batches/health", "/batches/sql/crash")
    for path in (*lists, batch, child):
        page = site.get(path)
        assert page.status == 200 and "bt-live" in page.text, path
        assert page.headers.get("Access-Control-Allow-Origin") is None, "no other site reads a page"
    assert site.get(f"/batch/{uuid.uuid4()}").status == 404
    assert site.get("/batchtrack/static/bt.css").status == 200
    assert "SIGSEGV" in site.get(child).text
    assert "-A cli_shop batchtrack repro" in site.get(child).text
    api = "/api/batchtrack"
    assert site.get(f"{api}/batches/{rich.invoices}").data["batch"]["name"] == "invoices"
    assert site.get(f"{api}/views/crash?limit=1").data[0]["signal"]
    assert site.get(f"{api}/nonsense").status == 404
    assert site.get("/healthcheck").text == "OK"
    eventually(lambda: "celery_batchtrack_up 1.0" in site.get("/metrics").text, what="our metrics in Flower's")
    assert site.post(f"/batch/{rich.paused}", {"Sec-Fetch-Site": "cross-site"}, action="cancel").status == 403
    assert "Resumed" in site.message(site.post(f"/batch/{rich.paused}", action="resume"))
    store = Store(running.database)
    assert store.progress(rich.paused).paused_at is None
    assert site.post(f"{api}/batches/{rich.paused}/pause").data["paused"] is True
    store.dispose()
    log = running.process.output()
    assert "Traceback" not in log and "flower_no_tab" not in log, log


def test_the_command_without_batchtrack_or_flower_says_what_to_do(flowers: Flowers) -> None:
    shell = flowers[processes.NEWEST].shell
    (shell.folder / "plain.py").write_text("from celery import Celery\napp = Celery('plain', broker='memory://')\n")
    broken = type(shell)(shell.folder, shell.env, "plain")
    assert "BatchTrack(app)" in broken("flower", code=78)[1]
    (shell.folder / "without" / "flower").mkdir(parents=True)
    (shell.folder / "without" / "flower" / "__init__.py").write_text("raise ModuleNotFoundError('x', name='flower')\n")
    path = f"{shell.folder}/without:{shell.env['PYTHONPATH']}"
    assert "celery-batchtrack[flower]" in shell("flower", code=78, PYTHONPATH=path)[1]
