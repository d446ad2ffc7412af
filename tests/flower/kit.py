"""Flower in this process, on an IO loop of its own thread, asked over real HTTP."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

from celery import Celery
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.web import create_signed_value

from celery_batchtrack import BatchTrack

SECRET = "a secret of the tests"
BASIC = {"Authorization": "Basic " + base64.b64encode(b"ann:pass").decode()}
OAUTH = {"Cookie": f"user={create_signed_value(SECRET, 'user', 'ann@example.com').decode()}"}


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def data(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A Flower that answers on a port."""

    port: int
    application: Any
    loop: Any
    prefix: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request, without what follows a redirect."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {**self.headers, **(headers or {})}
        data = None if body is None else urlencode(body, doseq=True)
        if data is not None:
            sent["Content-Type"] = "application/x-www-form-urlencoded"
        try:
            connection.request(method, self.prefix + path, data, sent)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, headers: Mapping[str, str] | None = None, **body: Any) -> Answer:
        return self.ask("POST", path, body, headers)

    def send(self, path: str, body: bytes) -> Answer:
        """A POST of this very body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", self.prefix + path, body, self.headers)
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def message(self, answer: Answer) -> str:
        """What the page says to which an action leads."""
        assert answer.status == 303, answer.text
        cookie = answer.headers["Set-Cookie"].partition(";")[0]
        path = answer.headers["Location"].removeprefix(self.prefix)
        page = self.ask("GET", path, headers={"Cookie": "; ".join(filter(None, [self.headers.get("Cookie"), cookie]))})
        assert page.status == 200
        return page.text.partition('role="status">')[2].partition("</p>")[0]


def shop(url: str, **conf: Any) -> Celery:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.update(batchtrack_database_url=url, **conf)
    BatchTrack(app)
    return app


@contextmanager
def served(capp: Celery, **options: Any) -> Iterator[Served]:
    """Flower with our pages, with these of its options, as its command would set it up."""
    ready, box = threading.Event(), {}

    def run() -> None:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        try:
            box["served"] = _start(capp, options)
            ready.set()
            loop.run_forever()
        except BaseException as error:
            box["error"] = error
            raise
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(30)
    if "error" in box:
        raise box["error"]
    found: Served = box["served"]
    try:
        yield found
    finally:
        found.application.close_pages()
        found.loop.add_callback(found.loop.asyncio_loop.stop)
        thread.join(30)


def _start(capp: Celery, options: Mapping[str, Any]) -> Served:
    import flower.app
    from flower.events import Events
    from flower.options import default_options
    from flower.urls import settings
    from flower.utils import prepend_url

    from celery_batchtrack.surfaces.flower.install import extended

    io_loop = IOLoop.current()
    chosen = SimpleNamespace(**{**{name: default_options[name] for name in default_options}, **options})
    own = {**settings, "cookie_secret": SECRET}
    if chosen.url_prefix:
        for name in ("login_url", "static_url_prefix"):
            own[name] = prepend_url(settings[name], chosen.url_prefix)
    if chosen.auth:
        own["oauth"] = {"key": "k", "secret": "s", "redirect_uri": "http://127.0.0.1/login"}
    events = Events(capp, io_loop, max_tasks_in_memory=100)
    application = extended(flower.app.Flower)(
        capp=capp, options=chosen, events=events, io_loop=io_loop, **own
    )
    sockets = bind_sockets(0, "127.0.0.1")
    HTTPServer(application).add_sockets(sockets)
    prefix = f"/{chosen.url_prefix.strip('/')}" if chosen.url_prefix else ""
    return Served(sockets[0].getsockname()[1], application, io_loop, prefix)
