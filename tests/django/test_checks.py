"""What ``manage.py check`` says of a configuration that is wrong."""

from __future__ import annotations

from tests.django.project import Project

WRONG = """
import io
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.test import override_settings
from celery_batchtrack import BatchTrack

def told(number, *texts, **wrong):
    with override_settings(**wrong):
        BatchTrack.of().reset()
        err = io.StringIO()
        try:
            call_command("check", stderr=err, stdout=io.StringIO())
        except SystemCheckError as error:
            assert "E0" in number
            err.write(str(error))
    for text in (number, *texts):
        assert text in err.getvalue(), err.getvalue()

told("batchtrack.E002", "CELERY_BATCHTRACK_LAESE", "did you mean", CELERY_BATCHTRACK_LAESE="20s")
told("batchtrack.E002", "CELERY_BATCHTRACK_LEASE", CELERY_BATCHTRACK_LEASE="soon")
told("batchtrack.E002", "django:default", CELERY_BATCHTRACK_DATABASE_URL="", CELERY_BROKER_URL="memory://")
told("batchtrack.E003", "no 'other': it has 'default', 'odd'", CELERY_BATCHTRACK_DATABASE_URL="django:other")
told("batchtrack.E003", "must be PostgreSQL or SQLite", CELERY_BATCHTRACK_DATABASE_URL="django:odd")
told("batchtrack.W001", "Write it as CELERY_BATCHTRACK_LEASE", BATCHTRACK_LEASE="20s")
print("all told")
"""


def test_check_tells_what_of_the_settings_is_wrong(on_sqlite: Project) -> None:
    odd = on_sqlite.settings('DATABASES["odd"] = {"ENGINE": "django.db.backends.dummy"}')
    assert "all told" in on_sqlite.run(WRONG, settings=odd)


def test_check_says_what_to_write_where_there_is_no_celery_app(on_sqlite: Project) -> None:
    made = on_sqlite.folder / "shop" / "__init__.py"
    text = made.read_text()
    made.write_text("")
    try:
        output = on_sqlite.manage("check", code=1)
    finally:
        made.write_text(text)
    assert "batchtrack.E001" in output
    assert "BatchTrack(app)" in output
    assert "shop/__init__.py" in output


DATABASE = """
import io
from django.core.management import call_command

def told():
    err = io.StringIO()
    call_command("check", databases=["default"], stderr=err, stdout=io.StringIO())
    return err.getvalue()

assert "batchtrack.W003" in told() and "has no batchtrack tables" in told()
call_command("migrate", verbosity=0)
assert told() == "", told()
from django_celery_beat.models import IntervalSchedule, PeriodicTask
every = IntervalSchedule.objects.create(every=15, period="seconds")
PeriodicTask.objects.create(name="batchtrack-detect-crashes", task="x", interval=every, enabled=False)
assert "batchtrack.W002" in told()
from django.db import connection
connection.cursor().execute("UPDATE batchtrack_alembic_version SET version_num = '0001'")
assert "batchtrack.W003" in told() and "is older" in told()
print("all told")
"""


def test_check_of_the_database_tells_of_its_tables_and_of_a_disabled_detector(
    on_sqlite: Project, tmp_path: object
) -> None:
    beat = on_sqlite.settings(f"""
        DATABASES["default"]["NAME"] = "{tmp_path}/beat.sqlite3"
        INSTALLED_APPS += ["django_celery_beat"]
    """)
    assert "all told" in on_sqlite.run(DATABASE, settings=beat)
