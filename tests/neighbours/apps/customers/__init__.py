"""A Django app: the tenants of `tests.neighbours.apps.tenants`."""
