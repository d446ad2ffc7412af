"""The pages in a real browser: every page and action on every version, live refresh, narrow and dark."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from celery_batchtrack.store import Store
from celery_batchtrack.vocabulary.states import BatchStatus
from tests.flower import processes, scenes
from tests.flower.kit import served, shop
from tests.flower.processes import NEWEST, Running
from tests.helpers import ROOT, eventually
from tests.servers import ServiceMissing, require
from tests.store.kit import Scene

pytestmark = pytest.mark.browser

Flowers = dict[str, Running]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip
WIDE, NARROW = 1280, 390
#: Stuck batches with something beside their name or their reason.
BESIDE = """[...document.querySelectorAll('.bt-stuck tbody tr')].filter(row => {
  const [name, why, since] = [...row.cells].map(cell => cell.getBoundingClientRect());
  return name.bottom > why.top || why.bottom > since.top;
}).map(row => row.textContent)"""


def chromium() -> str:
    names = (os.environ.get("BATCHTRACK_TEST_CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise ServiceMissing("no Chromium: install it, or name it in BATCHTRACK_TEST_CHROMIUM")
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError as error:
        raise ServiceMissing("no Playwright for Python: pip install playwright") from error
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = require(chromium)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, tempfile.TemporaryDirectory():
        started = playwright.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield started
        started.close()


class Tab:
    """A page, and what went wrong in it."""

    def __init__(self, page: Any, running: Running) -> None:
        self.page, self.running = page, running
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda told: self.errors.append(told.text) if told.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: self.requests.append(request.url))

    def go(self, path: str) -> None:
        answer = self.page.goto(self.running.url + path)
        assert answer is not None and answer.status == 200, path

    def fits(self) -> bool:
        """Nothing is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))

    def refreshes(self) -> int:
        return sum("fragment=1" in each for each in self.requests)

    def refreshed(self) -> None:
        """Until it has refreshed once more."""
        before = self.refreshes()
        self.page.wait_for_event("requestfinished", lambda request: "fragment=1" in request.url)
        assert self.refreshes() >= before


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[..., Any]]:
    """`with tab(running, width=…, scheme=…) as page`."""

    @contextmanager
    def open_(running: Running, width: int = WIDE, scheme: str = "light", height: int = 800) -> Iterator[Tab]:
        more = {"http_credentials": {"username": "ann", "password": "pass"}} if running.password else {}
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **more)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(15_000)
        try:
            found = Tab(context.new_page(), running)
            yield found
            assert found.errors == []
        finally:
            context.close()

    yield open_


@pytest.fixture
def shoot(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Keep a picture of what the window shows, where pictures are wanted."""

    def keep(tab: Tab, name: str) -> None:
        if request.config.getoption("--screenshots", default=False):
            folder = ROOT / "docs" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            tab.page.evaluate("document.activeElement && document.activeElement.blur()")
            tab.page.screenshot(path=folder / f"{name}.png")

    return keep


def pages_of(rich: scenes.Rich) -> dict[str, str]:
    return {
        "batches": "/batches", "batch": f"/batch/{rich.invoices}", "child": f"/batch/{rich.invoices}/{rich.crashed}",
        "crashes": "/batches/crashes", "workers": "/batches/workers?all=1", "health": "/batches/health?check=1",
        "sql": "/batches/sql/crash", "hostile": f"/batch/{rich.hostile}", "evil": f"/batch/{rich.hostile}/0",
        "import": f"/batch/{rich.parent}", "ended": f"/batch/{rich.images}", "all": "/batches?chip=all",
    }  # fmt: skip


# -- every page, every version ------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (NARROW, "dark")])
@pytest.mark.parametrize("version", list(processes.VERSIONS))
def test_every_page_fits_and_has_no_errors(
    flowers: Flowers, rich: scenes.Rich, tab: Any, version: str, width: int, scheme: str
) -> None:
    with tab(flowers[version], width, scheme) as seen:
        for name, path in pages_of(rich).items():
            seen.go(path)
            assert seen.page.locator("#bt-live > *").count() and seen.fits(), (name, width)
            thin = seen.page.evaluate(
                "[...document.querySelectorAll('.bt-bar rect.bt-f-crashed')].map(r => r.getBoundingClientRect().width)"
            )
            assert all(each >= 2 for each in thin), (name, thin)
            if width == NARROW:
                assert seen.page.evaluate(BESIDE) == [], "rows of a list are all laid out alike"


def test_pages_fit_every_window(flowers: Flowers, rich: scenes.Rich, tab: Any) -> None:
    pages = pages_of(rich)
    with tab(flowers[NEWEST]) as seen:
        for width in (320, 640, 800, 1024, 1920):
            seen.page.set_viewport_size({"width": width, "height": 800})
            for name in ("batches", "batch", "evil"):
                seen.go(pages[name])
                assert seen.fits(), (name, width)


@pytest.mark.parametrize("version", list(processes.VERSIONS))
def test_three_clicks_from_flower_to_the_python_line(
    flowers: Flowers, rich: scenes.Rich, tab: Any, version: str
) -> None:
    with tab(flowers[version]) as seen:
        seen.go("/workers")
        page = seen.page
        page.get_by_role("link", name="Batches", exact=True).first.click()
        page.get_by_role("link", name="invoices", exact=True).click()
        page.locator("details.bt-sig", has_text="SIGSEGV").locator("summary").click()
        page.locator("details.bt-sig[open]").get_by_text("render.py", exact=False).first.wait_for()
        page.locator("details.bt-sig[open] .bt-facts a").first.click()
        page.get_by_text("render.py:88 in embed_font").first.wait_for()
        assert re.search("INV-2011[89].*SIGSEGV", page.locator(".bt-dossier").inner_text(), re.DOTALL)
        copy = page.locator(".bt-stack .bt-copy")
        copy.click()
        page.locator(".bt-copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()").startswith("Fatal Python error")


@pytest.mark.parametrize("version", list(processes.VERSIONS))
def test_every_action_in_the_browser(flowers: Flowers, tab: Any, version: str) -> None:
    running = flowers[version]
    store = Store(running.database)
    scene = Scene(store)
    worker = scene.worker(pid=99)
    batch = scene.batch(4)
    scene.set_batch(batch, name="to be acted on")
    scene.complete(scene.run(batch, 0, worker=worker))
    scene.crash(scene.run(batch, 1, worker=worker))
    with tab(running) as seen:
        page = seen.page

        def told(text: str) -> None:
            page.locator(".bt-message[role=status]", has_text=text).wait_for()

        seen.go(f"/batch/{batch}")
        page.get_by_role("button", name="Pause", exact=True).click()
        told("Paused: what runs goes on")
        assert store.progress(batch).paused_at is not None
        page.get_by_role("button", name="Resume", exact=True).click()
        told("Resumed")
        page.get_by_role("link", name="Cancel…").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_text("pending children will never start").wait_for()
        dialog.get_by_text("Keep it running").click()
        assert not dialog.is_visible() and store.progress(batch).status == BatchStatus.RUNNING
        page.get_by_role("link", name="Cancel…").click()
        dialog.get_by_role("button", name="Cancel the batch").click()
        told("Cancelled: 2 children will not run")
        page.get_by_role("link", name="Retry…").click()
        dialog.get_by_label("2 cancelled").uncheck()
        dialog.get_by_role("button", name="Retry", exact=True).click()
        told("1 child runs again, in round 2")
        assert store.progress(batch).status == BatchStatus.RUNNING
        page.reload()
        assert page.locator(".bt-message[role=status]").count() == 0, "said once"
    store.dispose()


def test_an_item_is_released_in_the_browser(flowers: Flowers, tab: Any) -> None:
    running = flowers[NEWEST]
    store = Store(running.database)
    scene = Scene(store)
    worker = scene.worker(pid=98)
    for _ in range(2):
        batch = scene.batch(1)
        scene.crash(scene.run(batch, worker=worker), evidence=scenes.replace(scenes.OOM, item="twice.tif"))
        scene.kill("twice.tif", after=2, version="")
    with tab(running) as seen:
        seen.go("/batches/crashes")
        row = seen.page.locator("tr", has_text="twice.tif")
        row.get_by_role("button", name="Release").click()
        seen.page.locator(".bt-message[role=status]", has_text="Released twice.tif").wait_for()
        assert row.get_by_role("button", name="Release").count() == 0
    store.dispose()


def test_a_strict_content_security_policy_breaks_nothing(flowers: Flowers, rich: scenes.Rich, tab: Any) -> None:
    with tab(flowers[NEWEST]) as seen:

        def strict(route: Any) -> None:
            answer = route.fetch()
            policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'"
            route.fulfill(response=answer, headers={**answer.headers, "content-security-policy": policy})

        seen.page.route("**/batch**", strict)
        for path in (f"/batch/{rich.invoices}", f"/batch/{rich.hostile}/0", "/batches", "/batches/crashes"):
            seen.go(path)
        seen.page.locator("details.bt-sig summary").first.click()
        seen.refreshed()


# -- refreshing ---------------------------------------------------------------------------------------


def test_a_page_refreshes_itself_and_keeps_what_the_reader_did(flowers: Flowers, tab: Any) -> None:
    running = flowers[NEWEST]
    store = Store(running.database)
    scene = Scene(store)
    worker = scene.worker(pid=97)
    batch = scene.batch(6)
    scene.set_batch(batch, name="followed")
    scene.crash(scene.run(batch, 0, worker=worker), evidence=scenes.SEGFAULT)
    with tab(running, height=500) as seen:
        page = seen.page
        seen.go(f"/batch/{batch}")
        page.locator("details.bt-sig summary").click()
        page.locator("input[name=item]").fill("half typ")
        page.evaluate("window.scrollTo(0, 300)")
        done = page.locator(".bt-figures dd").first
        assert done.inner_text() == "1/6"
        for at in range(1, 5):
            scene.complete(scene.run(batch, at, worker=worker))
        page.wait_for_function("document.querySelector('.bt-figures dd').textContent === '5/6'")
        assert page.locator("details.bt-sig[open]").count() == 1
        assert page.locator("input[name=item]").input_value() == "half typ"
        assert page.evaluate("document.activeElement.name") == "item" and page.evaluate("window.scrollY") == 300
        scene.complete(scene.run(batch, 5, worker=worker))
        assert store.finish(batch) is not None
        page.locator("#bt-pulse[data-state=ended]").wait_for()
        assert page.get_by_role("link", name="Retry…").is_visible(), "what can be done has changed too"
    store.dispose()


def test_what_nobody_looks_at_is_not_refreshed(flowers: Flowers, tab: Any) -> None:
    with tab(flowers[NEWEST]) as seen:
        page = seen.page
        page.clock.install()
        seen.go("/batches")
        with page.expect_response("**/batches?fragment=1"):
            page.clock.run_for(2_500)
        _hide(page, True)
        before = seen.refreshes()
        page.clock.run_for(600_000)
        assert seen.refreshes() == before
        with page.expect_response("**/batches?fragment=1"):
            _hide(page, False)


def _hide(page: Any, hidden: bool) -> None:
    page.evaluate(
        "hidden => { Object.defineProperty(document, 'hidden', { configurable: true, get: () => hidden });"
        " document.dispatchEvent(new Event('visibilitychange')); }", hidden,
    )  # fmt: skip


def test_refreshing_can_be_stopped_and_waits_while_flower_is_away(flowers: Flowers, tab: Any) -> None:
    with tab(flowers[NEWEST]) as seen:
        page = seen.page
        seen.go("/batches")
        pulse = page.locator("#bt-pulse")
        pulse.click()
        assert pulse.get_attribute("data-state") == "paused"
        page.route("**/batches?fragment=1", lambda route: route.fulfill(status=503, body=""))
        pulse.click()
        page.locator("#bt-trouble", has_text="does not answer").wait_for()
        assert page.locator("tr[data-key]").count() > 3, "what was known is still shown"
        seen.errors.clear()  # the browser itself notes the 503


# -- with real tasks ----------------------------------------------------------------------------------


@pytest.fixture
def workshop(tmp_path: Path, migrated_sqlite: Path) -> Iterator[Running]:
    """A Flower beside a worker, with a database of their own."""
    shutil.copy(migrated_sqlite, tmp_path / "batchtrack.db")
    running = processes.start(NEWEST, tmp_path, f"sqlite:///{tmp_path}/batchtrack.db")
    try:
        eventually(running.answers, 60, what="Flower")
        running.start_worker()
        yield running
    finally:
        running.close()


def test_a_real_batch_is_found_from_both_sides(workshop: Running, tab: Any, shoot: Any) -> None:
    running = workshop
    batch = _send(running)
    store = Store(running.database)
    eventually(lambda: store.progress(batch).ended, 60, what=f"end of the batch: {running.workers[0].output()[-2000:]}")
    progress = store.progress(batch)
    assert (progress.completed, progress.failed, progress.crashed) == (6, 1, 1)
    with tab(running) as seen:
        page = seen.page
        seen.go(f"/batch/{batch}?status=crashed")
        page.get_by_text("cli_shop.py").first.wait_for()
        page.locator("#children td a").first.click()
        assert "DOC-13" in page.locator(".bt-dossier").inner_text()
        page.get_by_role("link", name="Flower's task page").click()
        shown = page.get_by_text("'bt_batch'").first.inner_text()
        assert f"'bt_batch': '{batch}', 'bt_child': 6, 'language': 'fr'" in shown
        seen.go(f"/batch/{batch}")
        page.get_by_role("link", name="Tasks", exact=True).last.click()
        page.locator("#tasks-table tbody tr").nth(7).wait_for()
        assert page.locator("#tasks-table tbody tr").count() == 8, "those of the batch, and no other"
        with page.expect_response("**/tasks/datatable"):
            page.locator("#tasks-table_filter input").fill(f"kwargs:bt_batch={batch}")
        assert page.locator("#tasks-table tbody tr").count() == 8
        shoot(seen, "flower-tasks")
    store.dispose()


def _send(running: Running) -> Any:
    import subprocess
    import sys
    import uuid

    code = (
        "from cli_shop import app, parse\nfrom celery_batchtrack import Batch\n"
        "for at in range(2): parse.delay([f'other {at}'])\n"
        "children = [parse.s([f'DOC-{at}'], language='fr') for at in (1, 2, 7, 8, 9, 10, 13, 14)]\n"
        "print(Batch.create('documents', children, app=app).id)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=running.shell.folder, env=running.shell.env, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return uuid.UUID(done.stdout.strip().splitlines()[-1])


# -- pictures -----------------------------------------------------------------------------------------


def test_pictures_of_the_pages(
    tab: Any, shoot: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For docs/flower.md."""
    if not request.config.getoption("--screenshots", default=False):
        pytest.skip("asked for with --screenshots")
    monkeypatch.chdir(tmp_path)
    url = "sqlite:///batchtrack.db"
    store = Store(url, auto_migrate=True)
    rich = scenes.build(store, hostile=False)
    with served(shop(url)) as site:
        running: Any = type("Site", (), {"url": f"http://127.0.0.1:{site.port}", "password": False})()
        shots = (
            ("flower-batches", "/batches", WIDE, "light", 640), ("flower-batches-dark", "/batches", WIDE, "dark", 640),
            ("flower-batch", f"/batch/{rich.invoices}?status=crashed", WIDE, "light", 1140),
            ("flower-child", f"/batch/{rich.invoices}/{rich.crashed}", WIDE, "light", 1000),
            ("flower-cancel", f"/batch/{rich.invoices}?confirm=cancel", WIDE, "light", 640),
            ("flower-crashes", "/batches/crashes", WIDE, "light", 820),
            ("flower-workers", "/batches/workers", WIDE, "light", 560),
            ("flower-health", "/batches/health?check=1", WIDE, "light", 760),
            ("flower-batches-phone", "/batches", NARROW, "light", 844),
            ("flower-batch-phone", f"/batch/{rich.invoices}?status=crashed", NARROW, "dark", 844),
        )  # fmt: skip
        for name, path, width, scheme, height in shots:
            scenes.alive(rich.scene)
            with tab(running, width, scheme, height) as seen:
                seen.go(path)
                if name == "flower-crashes":
                    seen.page.locator("details.bt-sig", has_text="SIGSEGV").locator("summary").click()
                shoot(seen, name)
    store.dispose()


