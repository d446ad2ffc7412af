"""The Django app: ``INSTALLED_APPS += ["celery_batchtrack.django"]``.

Tables by ``manage.py migrate``, checks by ``manage.py check``, a read-only admin.
"""
