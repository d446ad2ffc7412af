"""The admin: every page, on a batch with a crashed child; nothing can be changed."""

from __future__ import annotations

from tests.django.project import Project

PAGES = """
import re
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from celery_batchtrack import Batch, BatchTrack
from tests.store.kit import statements
from tests.unit.test_docs import store_with_a_crash
from uploads.tasks import count

User.objects.create_superuser("admin", "", "secret")
client = Client()
client.login(username="admin", password="secret")
store = BatchTrack.of().store
_, crashed = store_with_a_crash(store.url)
AT = "/admin/celery_batchtrack"

def page(path, code=200):
    answer = client.get(path)
    assert answer.status_code == code, (path, answer.status_code)
    return answer.content.decode()

def rows(text):
    return re.search(r'<p class="paginator">(.*?)</p>', text, re.DOTALL)[1].split()[0]

def asked(path):
    with CaptureQueriesContext(connection) as queries, statements(store.engine) as ours:
        page(path)
    return len(queries) + len(ours)

page(f"{AT}/batch/")
few = asked(f"{AT}/batch/")
BatchTrack.of().app.conf.task_always_eager = True
for number in range(12):
    Batch.create(f"plain {number}", [count.s(["a"])], tags=["nightly"])
assert asked(f"{AT}/batch/") == few  # however many are on the page

assert "Batches" in page("/admin/")
text = page(f"{AT}/batch/")
for part in ("docs", "plain 11", '<progress value="50"'):
    assert part in text, part
for search, found in (("plain 11", 1), ("nightly", 12), (str(crashed), 1), (str(crashed)[:13], 1), ("nothing", 0)):
    assert rows(page(f"{AT}/batch/?q={search}")) == str(found), search
assert rows(page(f"{AT}/batch/?status=completed")) == "12"
text = page(f"{AT}/batch/{crashed}/change/")
assert text.index("crashed</td>") < text.index("pending</td>")
for part in ("SIGSEGV", "PMC:01", "all children"):
    assert part in text, part
child = f"{AT}/child/{crashed}-0/change/"
assert child in text
text = page(child)
assert "SIGSEGV" in text and "PMC:00" in text
incident = re.search(r'href="([^"]*incident/[^"]*change/)"', text)[1]
assert "docs" not in page(incident) and child in page(incident)
assert rows(page(f"{AT}/child/?batch_id={crashed}")) == "2"
assert rows(page(f"{AT}/child/?batch_id={crashed}&status=crashed")) == "1"
assert rows(page(f"{AT}/child/?batch_id=nonsense")) == "0"
assert rows(page(f"{AT}/incident/?q=PMC")) == "1"
assert rows(page(f"{AT}/incident/?outcome=crashed")) == "1"
assert "docs@host" in page(f"{AT}/worker/?kind=worker")
page(re.search(r'href="([^"]*worker/[^"]*change/)"', page(f"{AT}/worker/"))[1])

for kind, key in (("batch", crashed), ("child", f"{crashed}-0")):
    page(f"{AT}/{kind}/add/", 403)
    assert client.post(f"{AT}/{kind}/{key}/change/", {"name": "changed"}).status_code == 403
    assert client.post(f"{AT}/{kind}/{key}/delete/", {"post": "yes"}).status_code == 403
    client.post(f"{AT}/{kind}/", {"action": "delete_selected", "_selected_action": key, "post": "yes"})
assert Batch.get(crashed).name == "docs" and store.progress(crashed).total == 2
page(f"{AT}/child/nonsense/change/", 302)
print("all there")
"""


def test_every_page_is_there_and_none_changes_anything(project: Project) -> None:
    assert "all there" in project.run(PAGES)


ELSEWHERE = """
from django.contrib.auth.models import User
from django.test import Client
User.objects.create_superuser("other", "", "secret")
client = Client()
client.login(username="other", password="secret")
assert "Batches" not in client.get("/admin/").content.decode()
assert client.get("/admin/celery_batchtrack/batch/").status_code == 403
print("not there")
"""


def test_there_are_no_pages_of_a_tracking_database_that_is_none_of_djangos(
    on_sqlite: Project, tmp_path: object
) -> None:
    elsewhere = on_sqlite.settings(f'CELERY_BATCHTRACK_DATABASE_URL = "sqlite:///{tmp_path}/elsewhere.db"')
    assert "not there" in on_sqlite.run(ELSEWHERE, settings=elsewhere)
