"""Becomes ``uploads/test_suite.py`` of the project: what holds in Django's own tests."""

from datetime import UTC, datetime, timedelta
from unittest import mock

from django.db import connection, transaction
from django.test import SimpleTestCase, TestCase, TransactionTestCase

from celery_batchtrack import Batch, chord, errors
from celery_batchtrack.glue import starting
from celery_batchtrack.glue.extension import BatchTrack

from .models import Upload
from .tasks import count, store


def words(upload):
    upload.refresh_from_db()
    return upload.words


class InATestCase(TestCase):
    """Everything is in a transaction that is never committed."""

    @classmethod
    def setUpTestData(cls):
        cls.upload = Upload.objects.create(name="poem")

    def test_a_chord_in_the_test_itself_runs_at_once(self):
        result = chord([count.s(["a"]), count.s(["b", "c"])])(store.s(self.upload.id))
        self.assertEqual(result.batch.status, "completed")
        self.assertEqual(words(self.upload), 3)

    def test_a_streamed_batch_in_the_test_itself_runs_at_its_end(self):
        with Batch("upload", on_success=store.s(self.upload.id)) as batch:
            batch.add(count.s(["a"]))
        self.assertEqual(batch.status, "completed")
        self.assertEqual(words(self.upload), 1)

    def test_batches_are_rolled_back_with_the_test_first(self):
        Batch.create("mine", [count.s(["a"])])
        self.assertEqual(len(Batch.find(name="mine")), 1)

    test_batches_are_rolled_back_with_the_test_then = test_batches_are_rolled_back_with_the_test_first

    def test_inside_atomic_nothing_starts_before_the_commit(self):
        with self.captureOnCommitCallbacks(execute=True):
            with transaction.atomic():
                result = chord([count.s(["a"]), count.s(["b", "c"])])(store.s(self.upload.id))
                self.assertIsNone(words(self.upload))
                for ask in (result.batch.progress, lambda: result.get(timeout=5), lambda: result.batch.status):
                    with self.assertRaisesRegex(errors.BatchNotFound, "has not been committed"):
                        ask()
            self.assertIsNone(words(self.upload))
        self.assertEqual(words(self.upload), 3)
        self.assertEqual(result.batch.status, "completed")

    def test_a_child_that_fails_fails_its_batch_and_not_the_transaction(self):
        with self.captureOnCommitCallbacks(execute=True):
            batch = Batch.create("upload", [count.s(5)], transaction="django")
        self.assertEqual(batch.status, "failed")
        Upload.objects.create(name="after")

    def test_an_owner_takes_its_batches_along(self):
        with self.captureOnCommitCallbacks(execute=True):
            batch = Batch.create("upload", [count.s(["a"])], transaction="django", owner=self.upload)
        self.assertEqual(batch.status, "completed")
        Upload.objects.all().delete()
        self.assertEqual(Batch.find(), [])

    def test_times_are_those_of_the_database(self):
        batch = Batch.create("upload", [count.s(["a"])])
        self.assertLess(abs(datetime.now(UTC) - batch.row.created_at), timedelta(minutes=1))

    def test_the_pulse_is_nobodys_thread(self):
        Batch.create("upload", [count.s(["a"])])
        self.assertIsNone(BatchTrack.of()._client)


class InTransactions(TransactionTestCase):
    """With real commits; Django empties the tables between two tests, ours included."""

    def setUp(self):
        self.assertEqual(Batch.find(), [])
        self.upload = Upload.objects.create(name="poem")

    def test_the_view_starts_its_batch_when_it_is_committed(self):
        answer = self.client.post("/uploads/", {"name": "poem", "text": "one two\nthree"}).json()
        self.assertEqual(Upload.objects.get(id=answer["upload"]).words, 3)

    test_the_view_starts_its_batch_in_a_second_test_too = test_the_view_starts_its_batch_when_it_is_committed

    def test_a_refused_upload_leaves_no_batch(self):
        with self.assertRaises(ValueError):
            self.client.post("/uploads/", {"name": "refused", "text": "one"})
        self.assertEqual(Batch.find(), [])

    def test_a_batch_is_written_in_the_transaction_and_run_after_it(self):
        with transaction.atomic():
            with Batch("upload", transaction="django", start="now", on_success=store.s(self.upload.id)) as batch:
                for word in "abc":
                    batch.add(count.s([word]))
                    batch.flush()
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM batchtrack_child")
                self.assertEqual(cursor.fetchone(), (3,))
            with self.assertRaisesRegex(errors.BatchNotFound, "has not been committed"):
                batch.progress()
            self.assertIsNone(words(self.upload))
        self.assertEqual(words(self.upload), 3)

    def test_an_exception_in_the_block_leaves_no_rows_although_it_is_caught(self):
        with transaction.atomic():
            with self.assertRaises(KeyError), Batch("upload", transaction="django") as batch:
                batch.add(count.s(["a"]))
                batch.flush()
                raise KeyError
            Upload.objects.create(name="after")
        self.assertEqual(Batch.find(), [])
        self.assertEqual(Upload.objects.count(), 2)

    def test_a_savepoint_that_is_rolled_back_takes_its_batches_along(self):
        for options in ({"transaction": "django"}, {}):
            with transaction.atomic():
                with self.assertRaises(KeyError), transaction.atomic():
                    Batch.create("upload", [count.s(["a"])], **options)
                    raise KeyError
                Upload.objects.create(name="after")
            self.assertEqual(Batch.find(), [])

    def test_outside_of_atomic_a_batch_is_a_transaction_of_its_own(self):
        with Batch("upload", transaction="django") as batch:
            batch.add(count.s(["a"]))
        self.assertEqual(batch.status, "completed")
        self.assertEqual(Batch.create("upload", [count.s(["a"])], transaction="django").status, "completed")

    def test_without_the_option_a_batch_in_atomic_is_created_by_on_commit(self):
        with transaction.atomic():
            with Batch("upload", on_success=store.s(self.upload.id)) as batch:
                batch.add(count.s(["a", "b"]))
            made = Batch.create("two", [count.s(["c"])])
            result = chord(count.s([word]) for word in "abc")(store.s(self.upload.id))
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM batchtrack_batch")
                self.assertEqual(cursor.fetchone(), (0,))
        self.assertEqual([each.status for each in (batch, made, result.batch)], ["completed"] * 3)
        self.assertEqual(words(self.upload), 3)

    def test_what_cannot_be_created_after_the_commit_is_told(self):
        broken = mock.patch.object(starting, "create", side_effect=errors.DatabaseUnavailable("away"))
        fails = self.assertRaises(errors.DatabaseUnavailable)
        with broken, self.assertLogs("celery_batchtrack", "ERROR") as log, fails, transaction.atomic():
            Batch.create("upload", [count.s(["a"])])
        self.assertIn("action=create_lost", log.output[0])
        self.assertIn("Create it anew", log.output[0])

    def test_what_cannot_be_sent_after_the_commit_is_left_to_the_sweep(self):
        broken = mock.patch.object(starting, "send", side_effect=ValueError("no broker"))
        with broken, self.assertLogs("celery_batchtrack", "ERROR") as log, transaction.atomic():
            batch = Batch.create("upload", [count.s(["a"])], transaction="django")
        self.assertIn("action=start_waits", log.output[0])
        BatchTrack.of().sweep()
        self.assertEqual(batch.status, "completed")

    def test_a_broken_transaction_is_not_written_in(self):
        with self.assertRaises(transaction.TransactionManagementError), transaction.atomic():
            transaction.set_rollback(True)
            Batch.create("upload", [count.s(["a"])], transaction="django")
        self.assertEqual(Batch.find(), [])


class WithoutADatabase(SimpleTestCase):
    def test_an_alias_that_is_not_there_is_named(self):
        with self.assertRaisesRegex(errors.InvalidOption, "no 'other': it has 'default'"):
            Batch.create("upload", [count.s(["a"])], transaction="django:other")
