"""A pool whose module is called as gevent's, where gevent itself is not installed."""

from celery.concurrency.thread import TaskPool as ThreadPool


class TaskPool(ThreadPool):
    pass
