"""The pages, asked over HTTP: what they show, whom they refuse, and what they do with bad input."""

from __future__ import annotations

import asyncio
import csv
import html
import io
import json
import re
import subprocess
import sys
import threading
import uuid
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from celery_batchtrack.store import Store
from celery_batchtrack.surfaces.flower import svg, table
from celery_batchtrack.surfaces.flower.base import sentence
from celery_batchtrack.surfaces.flower.loader import with_tab
from celery_batchtrack.surfaces.flower.snapshots import Snapshots
from celery_batchtrack.surfaces.reading import CHIPS
from celery_batchtrack.vocabulary.evidence import Evidence
from celery_batchtrack.vocabulary.states import BatchStatus, Cause, Detector
from tests.flower import scenes
from tests.flower.kit import BASIC, OAUTH, Answer, Served, served, shop
from tests.helpers import ROOT, eventually, unique
from tests.store.kit import Scene

AUTH: dict[str, dict[str, Any]] = {
    "none": {}, "basic": {"basic_auth": ["ann:pass"]}, "oauth": {"auth": ".*@example.com"}
}  # fmt: skip
HARMFUL = ("<b>bold", "<script>alert", "<script>x", "<img src=x", "<i>tag", "<u>key", "\x1b", "\u202e", "\x07")
API = "/api/batchtrack"
PAGES = ("/batches", "/batches/crashes", "/batches/workers", "/batches/health", "/batches/sql/crash")


def every_page(rich: scenes.Rich) -> list[str]:
    return [*PAGES, f"/batch/{rich.invoices}", f"/batch/{rich.invoices}/{rich.crashed}", f"/batch/{rich.hostile}/0"]


def queries_in(texts: list[str]) -> set[str]:
    """The SQL that pages show."""
    found = (re.findall(r'<code class="bt-sql-text">([^<]*)', page) for page in texts)
    return {html.unescape(text) for each in found for text in each}


def check_footers(site: Served, rich: scenes.Rich) -> None:
    """The query under a filtered table finds the rows of that table, and no others."""
    batch = f"/batch/{rich.invoices}"
    signature = site.get(f"{API}/batches/{rich.invoices}/signatures").data[0]["fingerprint"]
    lists = [f"/batches?chip={chip}" for chip in CHIPS]
    lists += [f"/batches?chip=all&search={search}" for search in ("INVOICES", str(rich.invoices)[:18], "a_b")]
    for path, row in [(path, r'<tr data-key="([0-9a-f-]{36})"') for path in lists] + [
        (f"{batch}?{query}", r'<tr data-key="c(\d+)"')
        for query in ("status=failed", "item=INV-20012", "worker=web-3&status=crashed", f"fingerprint={signature}")
    ]:
        text = site.get(path).text
        query = next(each for each in queries_in([text]) if "batch_progress" in each or "batch_child" in each)
        with rich.scene.store.read() as connection:
            found = [str(each[0 if "batches" in path else 2]) for each in connection.execute(sa.text(query))]
        assert found == re.findall(row, text), (path, query)
    for query in ("", "task=shop.images.thumbnail", "signal=SIGSEGV", "host=web-1", "host=web-2&signal=SIGKILL"):
        told = site.get(f"{API}/crashes?{query}").data
        shown = queries_in([site.get(f"/batches/crashes?{query}").text])
        with rich.scene.store.read() as connection:
            rows = {text: connection.execute(sa.text(text)).mappings().all() for text in shown}
        alike = next(found for text, found in rows.items() if "GROUP BY fingerprint" in text)
        assert {each["fingerprint"]: each["occurrences"] for each in alike} == {
            each["fingerprint"]: each["occurrences"] for each in told["signatures"]
        }, query
        items = next((found for text, found in rows.items() if "GROUP BY item" in text), [])
        assert {each["item"] for each in items} == {each["item"] for each in told["repeat_items"] if each["deaths"] > 1}


def plain(answer: Answer) -> str:
    """Text of a page."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", answer.text))


# -- what is shown ------------------------------------------------------------------------------------


def test_from_the_tab_to_the_python_line_in_three_clicks(site: Served, rich: scenes.Rich) -> None:
    assert 'href="/batches"' in site.get("/workers").text
    batches = site.get("/batches")
    batch = f"/batch/{rich.invoices}"
    assert f'href="{batch}"' in batches.text and "invoices" in batches.text
    child = f"{batch}/{rich.crashed}"
    crashed = site.get(f"{batch}?status=crashed")
    assert f'href="{child}"' in crashed.text and f'href="{batch}/0"' not in crashed.text.partition('id="children"')[2]
    shown = plain(site.get(child))
    for told in ("SIGSEGV", "render.py:88 in embed_font", "INV-20031", "web-3", "771", "page 3 of 12", "peak 412"):
        assert told in shown, told
    assert 'File &quot;/srv/shop/invoices/render.py&quot;, line 88' in site.get(child).text
    assert f"batchtrack repro {str(rich.invoices)[:13]} {rich.crashed}" in shown


def test_lists_are_chosen_and_searched_by_the_address(site: Served, rich: scenes.Rich) -> None:
    def ids(query: str) -> set[str]:
        return set(re.findall(r'<tr data-key="([0-9a-f-]{36})"', site.get(f"/batches?{query}").text))

    ended = {str(rich.reindex)}
    assert ids("chip=completed") == ended
    assert str(rich.invoices) in ids("") and not ids("") & ended
    assert str(rich.images) in ids("chip=crashed") and str(rich.paused) not in ids("chip=crashed")
    assert ids("chip=all&search=nightly") == ids("chip=all&search=INV-20031") == {str(rich.invoices)}
    assert site.get("/batches?chip=nonsense").status == 404
    assert site.get("/batches?after=nonsense").status == 400


def test_children_are_filtered_and_paged(site: Served, rich: scenes.Rich) -> None:
    page = site.get(f"/batch/{rich.invoices}?item=INV-20012")
    rows = re.findall(r'data-key="c(\d+)"', page.text)
    assert rows == ["12"] and "KeyError" in plain(page)
    first = site.get(f"/batch/{rich.invoices}")
    after = re.search(r'rel="next" href="[^"]*after=(\d+)', first.text)
    assert after is not None
    second = site.get(f"/batch/{rich.invoices}?after={after[1]}")
    assert re.findall(r'data-key="c(\d+)"', second.text)[0] == str(int(after[1]) + 1)
    assert site.get(f"/batch/{rich.invoices}?after=x").status == 400
    assert site.get(f"/batch/{rich.invoices}?status=nonsense").status == 400


def test_a_fragment_is_the_page_without_its_frame_and_the_same_for_all(site: Served, rich: scenes.Rich) -> None:
    whole, part = site.get(f"/batch/{rich.reindex}"), site.get(f"/batch/{rich.reindex}?fragment=1")
    assert "<html" not in part.text and part.text.strip()[:300] in whole.text
    assert part.headers["X-Batchtrack-Every"] == "0", "an ended batch stands still"
    again = site.get(f"/batch/{rich.reindex}?fragment=1", **{"If-None-Match": part.headers["Etag"]})
    assert (again.status, again.body) == (304, b"")
    assert site.get(f"/batch/{rich.invoices}?fragment=1").headers["X-Batchtrack-Every"] == "2"
    assert "&fragment=1" not in part.text and "?fragment=1" not in part.text, "links lead to whole pages"


def test_every_table_says_which_query_is_behind_it(site: Served, rich: scenes.Rich) -> None:
    texts = [site.get(path).text for path in (*PAGES[:4], f"/batch/{rich.invoices}", f"/batch/{rich.images}")]
    queries = queries_in(texts)
    assert len(queries) >= 10
    with rich.scene.store.read() as connection:
        for query in queries:
            connection.execute(sa.text(query)).all()
    assert "batchtrack_incident" in site.get("/batches/sql/crash").text
    check_footers(site, rich)


def test_an_exit_is_told_with_its_code_and_a_run_with_its_process(own: str) -> None:
    store = Store(own)
    scene = Scene(store)
    worker = scene.worker(pid=90)
    batch = scene.batch(3)
    left = Evidence(Cause.EXIT, exit_code=3, item="DOC-3", detected_by=Detector.MAIN, hostname="web-9")
    for at in range(2):
        scene.crash(scene.run(batch, at, worker=worker), evidence=left)
    scene.run(batch, 2, worker=worker, slot="4711:9")
    with served(shop(own)) as site:
        page = plain(site.get(f"/batch/{batch}"))
        assert page.count("exit code 3") == 3 and "callbacks died or failed" in page, "its signature, and two children"
        assert plain(site.get("/batches/crashes?host=web-9")).count("exit code 3") == 2, "its signature, and the item"
        assert "pid 4711" in plain(site.get("/batches/workers"))
    store.dispose()


def test_auto_refresh_off_means_no_refreshing(rich_url: str) -> None:
    with served(shop(rich_url), auto_refresh=False) as site:
        page = site.get("/batches")
        assert 'data-every="0"' in page.text and "bt-pulse" not in page.text


def test_health_is_told_and_a_scan_is_made_on_demand(site: Served) -> None:
    before = site.get("/batches/health")
    assert "Check now" in before.text and "tally_equals_rows" not in before.text
    site.get("/batches/health?check=1")
    shown = eventually(lambda: "tally_equals_rows" in site.get("/batches/health").text, what="findings of the scan")
    assert shown


def test_pages_and_their_queries_on_postgresql(postgres_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    url = postgres_server.create_database(migrated=True)
    store = Store(url)
    rich = scenes.build(store)
    batch = f"{API}/batches/{rich.invoices}"
    with served(shop(url)) as site:
        lists = [f"/batches?chip={chip}" for chip in CHIPS]
        lists += ["/batches?chip=all&search=INV-20031", "/batches?search=01"]
        filters = [f"/batch/{rich.invoices}?{name}=INV-20012" for name in ("item", "worker", "fingerprint")]
        api = [batch, f"{batch}/children", f"{batch}/children/31", f"{API}/crashes?signal=SIGKILL", f"{API}/workers"]
        more = [f"/batch/{rich.invoices}/children.csv", f"{API}/invariants"]
        for path in (*every_page(rich), *lists, *filters, *api, *more):
            assert site.get(path).status == 200, path
        check_footers(site, rich)
        texts = [site.get(path).text for path in (*PAGES[:4], f"/batch/{rich.invoices}", f"/batch/{rich.invoices}/31")]
    with store.read() as connection:
        for query in queries_in(texts):
            assert connection.execute(sa.text(query)).all() is not None
    store.dispose()
    postgres_server.drop_database(url)


# -- bad input ----------------------------------------------------------------------------------------


def test_names_stacks_and_identifiers_are_harmless(site: Served, rich: scenes.Rich) -> None:
    hostile = f"/batch/{rich.hostile}"
    paths = [*every_page(rich), hostile, f"{hostile}/1", "/batches?chip=all&search=<script>"]
    for path in paths:
        text = site.get(path).text
        assert [harm for harm in HARMFUL if harm in text] == [], path
        assert not re.search(r"\son[a-z]+\s*=\s*[\"']", re.sub(r'title="[^"]*"', "", text)), "no handlers in the page"
        scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, re.DOTALL)
        assert all("src=" in attributes and not body for attributes, body in scripts), "no script in the page"
        assert " style=" not in text
    child = site.get(f"/batch/{rich.hostile}/0")
    assert len(child.body) < 200_000 and "show all" in child.text


def test_a_spreadsheet_runs_nothing_of_a_download(site: Served, rich: scenes.Rich) -> None:
    got = site.get(f"/batch/{rich.hostile}/children.csv")
    assert got.headers["Content-Type"].startswith("text/csv") and "attachment" in got.headers["Content-Disposition"]
    rows = list(csv.DictReader(io.StringIO(got.text)))
    assert len(rows) == 2
    assert not [cell for row in rows for cell in row.values() if cell.lstrip()[:1] in ("=", "+", "-", "@")]
    assert not [harm for harm in ("\x1b", "\x07", "\u202e", "[31m") if harm in rows[0]["item"] + rows[0]["message"]]
    assert "red esrever\nline" in rows[0]["item"], "what is to be read stays"
    assert len(list(csv.reader(io.StringIO(site.get(f"/batch/{rich.invoices}/children.csv").text)))) == 241
    for evil in ("=1+1", "+1", "-1", "@x", "\t=1", "\n=1", "  =1"):
        assert table.cell(evil) == "'" + evil
    cells = {-1: "-1", 1.5: "1.5", None: "", True: "true", "a\0b": "ab", "\r=1": "'=1"}
    assert {value: table.cell(value) for value in cells} == cells


@pytest.mark.parametrize(
    "path",
    ["/batch/nonsense", f"/batch/{uuid.uuid4()}", "/batch/%00", "/batches/sql/nonsense", f"/batch/{uuid.uuid4()}/7"],
)
def test_what_is_not_there_is_said_with_a_way_back(site: Served, path: str) -> None:
    answer = site.get(path)
    assert answer.status in (400, 404) and 'href="/batches"' in answer.text and "Traceback" not in answer.text
    assert site.get(path + "?fragment=1").status == answer.status


def test_a_child_that_is_not_there_is_no_page(site: Served, rich: scenes.Rich) -> None:
    for position in ("99999", "9" * 17, "9" * 60):
        assert site.get(f"/batch/{rich.invoices}/{position}").status == 404
    assert site.get(f"/batch/{str(rich.invoices)[:18]}").status == 200, "the beginning of an id is enough"


def test_a_database_that_is_not_there_is_said_and_flower_goes_on(tmp_path: Any) -> None:
    with served(shop(f"sqlite:///{tmp_path}/nowhere/x.db"), basic_auth=["ann:pass"]) as site:
        site.headers.update(BASIC)
        for path in PAGES[:4]:
            answer = site.get(path)
            assert answer.status == 503 and "does not answer" in answer.text and "What to" not in answer.text
        assert site.get("/api/batchtrack/health").status == 503
        assert site.get("/batches?fragment=1").status == 503
        assert site.get("/healthcheck").text == "OK" and site.get("/workers").status == 200


def test_an_application_without_batchtrack_is_told_so(tmp_path: Any) -> None:
    from celery import Celery

    with served(Celery("plain", broker="memory://", set_as_current=False)) as site:
        assert site.get("/batches").status == 500 and "BatchTrack(app)" in site.get("/batches").text


def test_a_locked_database_holds_up_neither_flower_nor_its_threads(postgres_server: Any) -> None:
    url = postgres_server.create_database(migrated=True)
    store = Store(url)
    with served(shop(url)) as site:
        assert site.get("/batches").status == 200
        snapshots = site.application.snapshots
        snapshots.patience = 60.0
        with store.write() as connection:
            connection.execute(sa.text("LOCK TABLE batchtrack_batch IN ACCESS EXCLUSIVE MODE"))
            ended: list[int] = []
            asking = [_in_thread(site, f"/batches?search=s{at}", ended) for at in range(24)]
            eventually(lambda: len(snapshots._answers) >= 24, what="reads that wait")
            for path in ("/healthcheck", "/workers"):
                assert site.get(path).status == 200
            assert ended == [], "Flower answered while every page waited"
            assert len(snapshots.readers.threads) == 4
            snapshots.patience = 0.1
            page = site.get("/batches?search=impatient")
            assert page.status == 503 and "does not answer" in page.text
            assert site.post(f"/batch/{uuid.uuid4()}", action="explode").status == 400, "nothing was asked of it"
        for each in asking:
            each.join()
        assert len(ended) == 24 and set(ended) <= {200, 503}
        snapshots.patience = 60.0
        assert site.get("/batches").status == 200
    store.dispose()
    postgres_server.drop_database(url)


def test_a_role_that_may_only_read_is_enough_to_look(postgres_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url = postgres_server.create_database(migrated=True)
    store, role = Store(url), unique("reader")
    batch_id = Scene(store).batch(2)
    with store.write() as connection:
        for statement in (f"CREATE ROLE {role} LOGIN", f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"):
            connection.execute(sa.text(statement))
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    with served(shop(url.replace("postgres@", f"{role}@"))) as site:
        of_batch = (f"/batch/{batch_id}", f"/batch/{batch_id}/0", f"{API}/batches/{batch_id}", f"{API}/views/crash")
        for path in (*PAGES, *of_batch):
            assert site.get(path).status == 200, path
        refused = site.post(f"/batch/{batch_id}", action="cancel")
        assert refused.status == 503 and "grants" in refused.text
    with store.write() as connection:
        for statement in (f"DROP OWNED BY {role}", f"DROP ROLE {role}"):
            connection.execute(sa.text(statement))
    store.dispose()
    postgres_server.drop_database(url)


def test_a_database_with_too_many_who_wait_is_asked_no_more(rich_url: str) -> None:
    free = threading.Event()
    with served(shop(rich_url)) as site:
        snapshots = site.application.snapshots

        async def fill() -> None:
            for at in range(64):
                snapshots._start(at, free.wait, 0.0)

        site.loop.add_callback(fill)
        eventually(lambda: len(snapshots._answers) == 64, what="reads that wait")
        assert site.get("/batches").status == 503 and "wait already" in site.get("/batches").text
        free.set()
        eventually(lambda: site.get("/batches").status == 200, what="an answer again")


def test_a_read_that_hangs_does_not_keep_flower_from_ending() -> None:
    code = (
        "import asyncio, threading\nfrom celery_batchtrack.surfaces.flower.snapshots import Silent, Snapshots\n"
        "async def main():\n"
        "    try: await Snapshots().get('page', threading.Event().wait, patience=0.01)\n"
        "    except Silent: print('silent')\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "silent\n"


def test_all_who_look_at_one_page_share_one_read(rich_url: str) -> None:
    free, reads = threading.Event(), []

    def read() -> str:
        reads.append(1)
        free.wait(30)
        return "seen"

    async def main() -> list[str]:
        snapshots = Snapshots()
        looking = [asyncio.ensure_future(snapshots.get("page", read)) for _ in range(50)]
        await asyncio.sleep(0)
        free.set()
        found = await asyncio.gather(*looking)
        found.append(await snapshots.get("page", read))
        snapshots.forget()
        found.append(await snapshots.get("page", read))
        snapshots.close()
        return found

    assert asyncio.run(main()) == ["seen"] * 52 and len(reads) == 2


def _in_thread(site: Served, path: str, ended: list[int]) -> threading.Thread:
    thread = threading.Thread(target=lambda: ended.append(site.get(path).status))
    thread.start()
    return thread


# -- who may ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "flower"])
@pytest.mark.parametrize("auth", list(AUTH))
def test_pages_and_api_are_behind_flowers_authentication(
    rich: scenes.Rich, rich_url: str, auth: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLOWER_UNAUTHENTICATED_API", raising=False)
    with served(shop(rich_url), url_prefix=prefix, **AUTH[auth]) as site:
        paths = [*every_page(rich), f"/batch/{rich.invoices}/json", f"/batch/{rich.invoices}/children.csv"]
        strangers = {"none": 200, "basic": 401, "oauth": 302}[auth]
        assert {site.get(path).status for path in paths} == {strangers}
        assert site.get("/api/batchtrack/batches").status == {"none": 401, "basic": 401, "oauth": 302}[auth]
        if auth == "oauth":
            assert site.get("/batches").headers["Location"].startswith(site.prefix + "/login")
        site.headers.update({"none": {}, "basic": BASIC, "oauth": OAUTH}[auth])
        for path in paths:
            answer = site.get(path)
            assert answer.status == 200, path
            for link in re.findall(r'(?:href|src|action|formaction)="(/[^"]*)"', answer.text):
                assert link.startswith(site.prefix + "/"), f"{link} in {path}"
        assert site.get("/batchtrack/static/bt.js").status == 200
        assert site.get("/api/batchtrack/batches").status == (401 if auth == "none" else 200)


def test_actions_need_what_flower_needs(own: str, rich: scenes.Rich) -> None:
    path = f"/batch/{rich.paused}"
    status = Store(own)
    with served(shop(own), **AUTH["basic"]) as site:
        assert site.post(path, action="cancel").status == 401
        site.headers.update(BASIC)
        for foreign in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
            assert site.post(path, foreign, action="cancel").status == 403
            assert site.post(f"/api/batchtrack/batches/{rich.paused}/cancel", foreign).status == 403
    with served(shop(own), **AUTH["oauth"]) as site:
        assert site.post(path, action="cancel").status in (302, 403)
        site.headers.update(OAUTH)
        assert site.post(path, action="cancel").status == 403, "without the token"
        page = site.get("/batches")
        token = re.search(r'name="_xsrf" value="([^"]+)"', page.text)
        cookie = re.search(r"_xsrf=[^;]+", page.headers["Set-Cookie"])
        assert token is not None and cookie is not None
        both = {"Cookie": f"{OAUTH['Cookie']}; {cookie[0]}"}
        assert site.post(path, both, action="pause", _xsrf=token[1]).status == 303
    with served(shop(own), read_only=True) as site:
        assert site.post(path, action="cancel").status == 403
        assert site.post("/batches/release", item="x").status == 403
        page = site.get(f"/batch/{rich.invoices}").text
        assert "formaction" not in page and "bt-cancel" not in page
    with served(shop(own)) as site:
        foreign = {"Sec-Fetch-Site": "cross-site"}
        assert site.post(path, foreign, action="cancel").status == 403, "also where Flower itself asks for nothing"
        proxied = {"Origin": "https://ops.example", "X-Forwarded-Host": "ops.example"}
        assert site.post(path, proxied, action="resume").status == 303
        assert site.post(path, {**proxied, "Origin": "https://evil.example"}, action="cancel").status == 403
    assert status.progress(rich.paused).status == BatchStatus.RUNNING


def test_without_authentication_the_pages_can_be_refused(rich_url: str, rich: scenes.Rich) -> None:
    with served(shop(rich_url, batchtrack_flower_require_auth=True)) as site:
        for path in every_page(rich):
            answer = site.get(path)
            assert answer.status == 403 and "--basic-auth" in answer.text and "INV-" not in answer.text
        assert site.get("/api/batchtrack/batches").status in (401, 403)
        assert site.post(f"/batch/{rich.paused}", action="cancel").status == 403
        assert site.get("/workers").status == 200
    with served(shop(rich_url, batchtrack_flower_require_auth=True), basic_auth=["ann:pass"]) as site:
        assert site.ask("GET", "/batches", headers=BASIC).status == 200


# -- actions ------------------------------------------------------------------------------------------


def test_buttons_do_what_the_commands_do_and_say_what_was_done(own: str, rich: scenes.Rich) -> None:
    store = Store(own)
    with served(shop(own)) as site:
        paused, images, invoices = (f"/batch/{each}" for each in (rich.paused, rich.images, rich.invoices))
        assert "Resumed" in site.message(site.post(paused, action="resume"))
        assert "Nothing to do" in site.message(site.post(paused, action="resume"))
        assert "Paused" in site.message(site.post(paused, action="pause"))
        assert store.progress(rich.paused).paused_at is not None
        assert "2 children run again, in round 2" in site.message(site.post(images, action="retry", only="crashed"))
        assert store.progress(rich.images).status == BatchStatus.RUNNING
        assert "Not done" in site.message(site.post(invoices, action="retry")), "it runs"
        assert "Cancelled: " in site.message(site.post(invoices, action="cancel"))
        assert "had ended already" in site.message(site.post(invoices, action="cancel"))
        assert store.progress(rich.invoices).status == BatchStatus.CANCELLED
        item = "IMG-00007.tif"
        assert "Released" in site.message(site.post("/batches/release", item=item, task="shop.images.thumbnail"))
        assert "is not in quarantine" in site.message(site.post("/batches/release", item=item))
        assert site.post(paused, action="explode").status == 400
        assert site.post(f"/batch/{uuid.uuid4()}", action="cancel").status == 404
        assert site.post("/batches/release").status == 400
    store.dispose()


def test_a_cancel_is_asked_for_twice(site: Served, rich: scenes.Rich) -> None:
    page = site.get(f"/batch/{rich.invoices}")
    assert '<dialog class="bt-dialog" id="bt-cancel"' in page.text and 'bt-cancel-title" open' not in page.text
    assert 'bt-cancel-title" open' in site.get(f"/batch/{rich.invoices}?confirm=cancel").text, "without scripts too"


# -- REST ---------------------------------------------------------------------------------------------


def test_rest_tells_what_the_pages_tell(site: Served, rich: scenes.Rich) -> None:
    api = API
    listed = site.get(f"{api}/batches?chip=crashed&limit=2").data
    assert len(listed["batches"]) == 2 and listed["next"]
    more = site.get(f"{api}/batches?chip=crashed&limit=2&after={quote(listed['next'])}").data["batches"]
    assert not {each["id"] for each in more} & {each["id"] for each in listed["batches"]}
    everything = site.get(f"{api}/batches").data["batches"]
    long = next(each for each in everything if each["id"] == str(rich.hostile))["description"]
    assert len(long) == 1000 and long.endswith("y…") and str(rich.reindex) in {each["id"] for each in everything}
    assert len(site.get(f"{api}/batches/{rich.hostile}").data["batch"]["description"]) == 100_000
    page = site.get(f"{api}/batches/{rich.invoices}").data
    assert page["batch"]["name"] == "invoices" and page["batch"]["crashed"] == 3 and page["durations"]["count"] == 180
    assert site.get(f"{api}/batches/{rich.invoices}/signatures").data == page["signatures"]
    children = site.get(f"{api}/batches/{rich.invoices}/children?status=crashed").data["children"]
    assert [each["position"] for each in children] == [31, 118, 119] and children[0]["signal"] == "SIGSEGV"
    child = site.get(f"{api}/batches/{rich.invoices}/children/{rich.crashed}").data
    assert child["attempts"][0]["stack"].startswith("Fatal Python error")
    download = site.get(f"{api}/batches/{rich.invoices}/children?format=csv&status=failed").text
    assert [row["position"] for row in csv.DictReader(io.StringIO(download))] == ["12", "77", "140", "141", "160"]
    assert {each["signal"] for each in site.get(f"{api}/crashes?signal=SIGKILL").data["signatures"]} == {"SIGKILL"}
    for narrowed, items in (("signal=SIGKILL", 2), ("host=web-2", 2), ("signal=SIGSEGV", 0), ("host=web-1", 0)):
        assert len(site.get(f"{api}/crashes?{narrowed}").data["repeat_items"]) == items, narrowed
    workers = {each["name"]: each["crashes_24h"] for each in site.get(f"{api}/workers").data["workers"]}
    assert workers == {"invoices@web-3": 3, "invoices@web-1": 0}
    assert site.get(f"{api}/health").status == 503, "one batch is paused, and nobody has swept"
    checks = site.get(f"{api}/invariants").data
    assert checks and all(each["violations"] == 0 for each in checks)


def test_rest_gives_the_rows_of_every_view(site: Served, rich: scenes.Rich) -> None:
    views = {each["name"]: each["columns"] for each in site.get("/api/batchtrack/views").data}
    assert len(views) == 13
    for name, columns in views.items():
        rows = site.get(f"/api/batchtrack/views/{name}?limit=3").data
        assert len(rows) <= 3 and all(list(row) == columns for row in rows), name
    found = site.get(f"/api/batchtrack/views/crash?batch_id={rich.invoices}&position=31").data
    assert [each["item"] for each in found] == ["INV-20031"]
    ordered = site.get("/api/batchtrack/views/slowest?order_by=-seconds&limit=2").data
    assert ordered[0]["seconds"] >= ordered[1]["seconds"]
    assert site.get(f"{API}/views/crash?format=csv&limit=2").text.startswith("incident_id,batch_id,")
    for bad, status in (
        ("views/nonsense", 404), ("views/crash?nonsense=1", 400), ("views/crash?limit=x", 400), ("nonsense", 404),
        ("views/crash?batch_id=7", 400), ("views/crash?order_by=nonsense", 400), ("batches/nonsense", 404),
        (f"batches/{uuid.uuid4()}/children", 404), ("batches?chip=nonsense", 400), ("batches?limit=100000", 400),
        ("batches?limit=0", 400), ("views/crash?limit=0", 400), (f"batches/{rich.invoices}/children?limit=0", 400),
    ):  # fmt: skip
        answer = site.get(f"/api/batchtrack/{bad}")
        assert answer.status == status and answer.data["error"], bad


def test_rest_acts(own: str, rich: scenes.Rich) -> None:
    with served(shop(own), basic_auth=["ann:pass"]) as site:
        site.headers.update(BASIC)
        batch = f"/api/batchtrack/batches/{rich.paused}"
        assert site.post(f"{batch}/resume").data["resumed"] is True
        assert site.post(f"{batch}/pause").data["paused"] is True
        assert site.post(f"{batch}/cancel?terminate=0").data["status"] == "cancelled"
        retried = site.post(f"/api/batchtrack/batches/{rich.images}/retry", only="crashed", queue="slow").data
        assert (retried["retried"], retried["round"]) == (2, 2)
        assert site.post(f"/api/batchtrack/batches/{rich.images}/retry").status == 409
        assert site.post(f"/api/batchtrack/batches/{rich.images}/retry", only="x").status == 400
        site.headers["Content-Type"] = "application/json"
        assert site.ask("POST", f"{API}/batches/{rich.images}/retry", headers={"Content-Length": "0"}).status == 409
        assert site.send(f"{API}/batches/{rich.images}/retry", b'{"only": ["x"]}').status == 400
        assert site.send(f"{API}/batches/{rich.images}/retry", b"[1]").status == 400
        assert site.send(f"{API}/quarantine/release", b'{"item": "IMG-00007.tif"}').data["released"]
        del site.headers["Content-Type"]
        released = site.post("/api/batchtrack/quarantine/release", item="IMG-00044.tif")
        assert released.status == 200 and released.data["released"][0]["item"] == "IMG-00044.tif"
        assert site.post("/api/batchtrack/quarantine/release", item="IMG-00044.tif").status == 404
        assert json.loads(site.post(f"/api/batchtrack/batches/{uuid.uuid4()}/pause").text)["status"] == 404


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_rest_takes_every_column_as_a_parameter(
    database: str, rich_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    server = request.getfixturevalue("postgres_server") if database == "postgresql" else None
    url = server.create_database(migrated=True) if server else rich_url
    with served(shop(url)) as site:
        for view in site.get(f"{API}/views").data:
            for column in view["columns"] if view["name"] != "batchtrack_invariant" else ["kind"]:
                for value in ("1", "x", str(uuid.uuid4()), "2026-11-25T00:00:00Z"):
                    status = site.get(f"{API}/views/{view['name']}?limit=1&{column}={value}").status
                    assert status in (200, 400), (view["name"], column, value)
    if server:
        server.drop_database(url)


# -- small parts --------------------------------------------------------------------------------------


def test_no_segment_of_a_bar_is_invisible_and_none_is_full_too_early() -> None:
    counts = dict.fromkeys(("completed", "failed", "crashed", "cancelled", "running"), 0)
    one = svg.bar({**counts, "total": 1_000_000, "completed": 999_998, "crashed": 1})
    assert [each.status for each in one] == ["completed", "crashed"]
    assert one[1].width * 160 / 100 >= 2 and one[-1].x + one[-1].width < 100
    full = svg.bar({**counts, "total": 10, "completed": 8, "failed": 1, "crashed": 1})
    assert full[-1].x + full[-1].width == pytest.approx(100)
    assert svg.bar({**counts, "total": 0}) == []
    tiny = svg.bar({**dict.fromkeys(counts, 1), "total": 10**9})
    assert len(tiny) == 5 and all(each.width >= svg.LEAST for each in tiny)


def test_what_is_wrong_is_said_in_sentences_and_identifiers_stay_as_they_are() -> None:
    for text in ("only is some of failed", "batchtrack_crash has no column", "callbacks goes alone", "'a' is no page"):
        assert sentence(text) == text
    assert sentence("no batch 7") == "No batch 7" and sentence("") == ""


def test_a_navigation_without_a_broker_is_left_as_it_is() -> None:
    assert with_tab("<ul></ul>") == "<ul></ul>"
    made = with_tab("""<ul><li><a href="{{ reverse_url('broker') }}">Broker</a></li></ul>""")
    assert """<li><a href="{{ reverse_url('bt_batches') }}">Batches</a></li>""" in made
