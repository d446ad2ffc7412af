"""The README's Django project works: its tests, its migrations, and a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.django.project import Project, readme_files

SUITE = Path(__file__).with_name("suite.py")


def test_the_readme_has_the_whole_project() -> None:
    assert {"shop/celery.py", "shop/__init__.py", "shop/settings.py", "uploads/tests.py"} <= set(readme_files())


def test_its_own_tests_pass_and_ours_too(project: Project) -> None:
    project.write("uploads/test_suite.py", SUITE.read_text())
    output = project.manage("test")
    assert "\nOK\n" in output
    assert "Ran 2 " not in output
    assert "stop_unwritten" not in output


COMPLETE = """
import io
from django.core.management import call_command
out = io.StringIO()
call_command("makemigrations", check_changes=True, dry_run=True, stdout=out)
call_command("check", databases=["default"], stdout=out, stderr=out)
call_command("migrate", stdout=out)
print(out.getvalue())
"""


def test_its_migrations_are_complete_and_its_tables_current(on_sqlite: Project) -> None:
    output = on_sqlite.run(COMPLETE)
    assert "No changes detected" in output
    assert "no issues" in output
    assert "No migrations to apply" in output


UPLOAD = """
from django.test import Client
from celery_batchtrack import Batch
from uploads.models import Upload
client = Client(raise_request_exception=False)
assert client.post("/uploads/", {"name": "refused", "text": "one"}).status_code == 500
assert Batch.find(name="upload") == [] and Upload.objects.count() == 0
answer = client.post("/uploads/", {"name": "poem", "text": "one two\\nthree"}).json()
batch = Batch.get(answer["batch"])
assert batch.wait(timeout=30, callbacks=True) == "completed", batch.report()
assert Upload.objects.get(id=answer["upload"]).words == 3
assert client.get(f"/progress/{answer['batch']}/").json()["percent"] == 100
assert batch.row.opened_by is None
Upload.objects.all().delete()
assert Batch.find(name="upload") == []
print("as it should be")
"""


def test_a_worker_runs_what_a_view_has_committed(project: Project) -> None:
    with project.worker():
        assert "as it should be" in project.run(UPLOAD)


TESTS = """
from django.core.management import call_command
from celery_batchtrack import BatchTrack
store = BatchTrack.of().store
before, place = store.store_id, store.shown_url
call_command("test", "uploads")
store = BatchTrack.of().store
assert (store.store_id, store.shown_url) == (before, place)
"""


def test_a_test_run_without_migrations_and_time_zones_has_its_tables_and_keeps_to_its_database(
    project: Project,
) -> None:
    project.write("uploads/test_suite.py", SUITE.read_text())
    without = project.settings("""
        MIGRATION_MODULES = {"celery_batchtrack": None, "uploads": None}
        USE_TZ, TIME_ZONE = False, "Asia/Tokyo"
        CELERY_TASK_ALWAYS_EAGER = True
    """)
    assert "\nOK\n" in project.run(TESTS, settings=without)


TWO = """
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connections, transaction
from django.test import Client
from celery_batchtrack import Batch, errors
from uploads.tasks import count

call_command("migrate", database="other", verbosity=0)

def tables(alias):
    return [name for name in connections[alias].introspection.table_names() if "batchtrack" in name]

if TRACKED:
    call_command("migrate", verbosity=0)
    assert "batchtrack_batch" in tables("other")
    with transaction.atomic():  # of default: it is waited for, too
        late = Batch.create("late", [count.s(["a"])])
        assert Batch.find() == []
    assert late.status == "completed"
    with transaction.atomic(using="other"):
        late = Batch.create("late", [count.s(["a"])], transaction="django")
        assert Batch.find(status="running") == []
    assert late.status == "completed"
    with transaction.atomic(), transaction.atomic(using="other"):
        Batch.create("rolled back", [count.s(["a"])], transaction="django")
        transaction.set_rollback(True, using="other")
    assert Batch.find(name="rolled back") == []
    User.objects.create_superuser("two", "", "secret")
    client = Client()
    client.login(username="two", password="secret")
    page = client.get("/admin/celery_batchtrack/batch/").content.decode()
    assert page.count("late") >= 2
    where = "django:default"
else:
    assert tables("other") == []
    where = "django:other"
try:
    Batch.create("upload", [count.s(["a"])], transaction=where)
except errors.InvalidOption as error:
    assert "db.sqlite3" in str(error) and "other.sqlite3" in str(error), error
else:
    raise AssertionError("written in another database")
print("kept apart")
"""


@pytest.mark.parametrize("tracked", [True, False])
def test_two_databases_are_kept_apart(on_sqlite: Project, tmp_path: Path, tracked: bool) -> None:
    two = on_sqlite.settings(f"""
        DATABASES["other"] = {{"ENGINE": "django.db.backends.sqlite3", "NAME": "{tmp_path}/other.sqlite3"}}
        CELERY_TASK_ALWAYS_EAGER = True
        CELERY_BATCHTRACK_OWNERS = {{}}
        CELERY_BATCHTRACK_DATABASE_URL = "django:{"other" if tracked else "default"}"
    """)
    if tracked:
        fresh = on_sqlite.settings(f"""
            from shop.{two.rpartition(".")[2]} import *
            DATABASES["default"]["NAME"] = "{tmp_path}/db.sqlite3"
        """)
        two = fresh
    assert "kept apart" in on_sqlite.run(f"TRACKED = {tracked}\n{TWO}", settings=two)


KEPT = """
from django.core.management import call_command
from celery_batchtrack import BatchTrack, errors
try:
    BatchTrack.of().store.store_id
except errors.SchemaMissing as error:
    assert "manage.py migrate" in str(error)
BatchTrack.of().migrate()
before = BatchTrack.of().store.store_id
call_command("migrate", verbosity=0)
call_command("migrate", "celery_batchtrack", "zero", verbosity=0)
call_command("migrate", verbosity=0)
BatchTrack.of().reset()
assert BatchTrack.of().store.store_id == before
print("kept")
"""


def test_tables_that_are_there_already_are_kept(on_sqlite: Project, tmp_path: Path) -> None:
    fresh = on_sqlite.settings(f"""
        DATABASES["default"]["NAME"] = "{tmp_path / "fresh.sqlite3"}"
        CELERY_BATCHTRACK_OWNERS = {{}}
    """)
    assert "kept" in on_sqlite.run(KEPT, settings=fresh)
