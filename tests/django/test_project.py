"""The README's Django project works: its tests, its migrations, and a worker."""

from __future__ import annotations

from pathlib import Path

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


def test_its_migrations_are_complete_and_its_tables_current(project: Project) -> None:
    output = project.run(COMPLETE)
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


def test_a_test_run_without_migrations_and_time_zones_has_its_tables(project: Project) -> None:
    project.write("uploads/test_suite.py", SUITE.read_text())
    without = project.settings("""
        MIGRATION_MODULES = {"celery_batchtrack": None, "uploads": None}
        USE_TZ, TIME_ZONE = False, "Asia/Tokyo"
    """)
    names = ("uploads.tests", "uploads.test_suite.InATestCase")
    assert "\nOK\n" in project.manage("test", *names, settings=without)


def test_an_alias_that_is_not_the_tracking_database_gets_no_tables(on_sqlite: Project) -> None:
    two = on_sqlite.settings("""
        DATABASES["other"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "other.sqlite3"}
    """)
    on_sqlite.manage("migrate", "--database", "other", settings=two)
    script = """
        from django.db import connections
        from celery_batchtrack import Batch, errors
        from uploads.tasks import count
        print(sorted(name for name in connections["other"].introspection.table_names() if "batchtrack" in name))
        try:
            Batch.create("upload", [count.s(["a"])], transaction="django:other")
        except errors.InvalidOption as error:
            print(error)
    """
    output = on_sqlite.run(script, settings=two)
    assert output.startswith("[]\n")
    assert "no batchtrack tables" in output
    assert "db.sqlite3" in output


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
