"""What our handlers have in common: Flower's protections, reading in threads, errors that say what to do."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import uuid
from base64 import b64decode
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote, urlencode, urlparse

import flower
from flower.api import BaseApiHandler
from flower.views import BaseHandler
from tornado.web import HTTPError

from celery_batchtrack import errors
from celery_batchtrack.glue.extension import BatchTrack
from celery_batchtrack.store import Store
from celery_batchtrack.store.view_texts import Words
from celery_batchtrack.surfaces import jsonio
from celery_batchtrack.surfaces.flower import actions, queries, show
from celery_batchtrack.surfaces.flower.snapshots import Silent, Snapshots
from celery_batchtrack.surfaces.render import clean
from celery_batchtrack.vocabulary.ids import ChildKey
from celery_batchtrack.vocabulary.settings import Settings

T = TypeVar("T")
logger = logging.getLogger("celery_batchtrack")

STATIC = Path(__file__).parent / "static"
#: Changes with the files, so that browsers do not keep old ones.
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(STATIC.iterdir()))).hexdigest()[:12]
_FLASH = "bt_message"
_FLOWER = tuple(int(part) for part in flower.__version__.split(".")[:2] if part.isdigit())

NO_AUTH = (
    "batchtrack_flower_require_auth is on, and this Flower has no authentication: start it with --basic-auth or --auth"
)


class Problem(Exception):
    """What a page shows instead of its data."""

    def __init__(self, status: int, title: str, text: str, advice: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.status, self.title, self.text, self.advice = status, title, text, advice


#: Ordinary words, and parameters too: `only is some of …`.
_PARAMETERS = frozenset({*actions.OPTIONS, "item", "task", "limit", "order_by"})


def sentence(text: str) -> str:
    """It begins with a capital letter, unless its first word is an identifier."""
    first = text.partition(" ")[0].rstrip(",:")
    is_word = first.isascii() and first.isalpha() and first not in _PARAMETERS
    return text[:1].upper() + text[1:] if is_word else text


def problem_of(error: Exception) -> Problem:
    """What to tell of an error of ours."""
    if isinstance(error, Problem):
        return error
    text = sentence(clean(error))
    if isinstance(error, errors.BatchNotFound):
        return Problem(404, "Not found", text, ("It may have been pruned: batchtrack_retention says when.",))
    if isinstance(error, errors.DatabaseUnavailable):
        return Problem(503, "The tracking database does not answer", text, (
            "Is it up, and reachable from this host? Flower's own pages do not need it.",
            "Does a transaction or a backup hold it? On PostgreSQL, look into pg_stat_activity.",
            "This page tries again by itself.",
        ))  # fmt: skip
    if isinstance(error, errors.SchemaError):
        return Problem(503, "The tables do not fit this version", text, ("Run: celery -A <app> batchtrack migrate",))
    if isinstance(error, errors.InvalidOption):
        return Problem(400, "Not understood", text)
    if isinstance(error, errors.BatchStateError):
        return Problem(409, "Not now", text)
    return Problem(500, "Not configured", text)


def answering(
    method: Callable[..., Awaitable[None]],
) -> Callable[..., Awaitable[None]]:
    """Errors of ours become a page, or JSON."""

    @functools.wraps(method)
    async def wrapper(self: Any, *args: Any) -> None:
        try:
            await method(self, *args)
        except (Problem, errors.BatchTrackError) as error:
            if self._headers_written:
                raise  # in the middle of a stream: the connection is cut, so that nobody takes it for whole
            self.tell(problem_of(error))

    return wrapper


class Shared(BaseHandler):  # type: ignore[misc]
    """Of pages and of the API."""

    def prepare(self) -> None:
        super().prepare()
        if self.settings_of_app().flower_require_auth and not self.has_auth:
            raise HTTPError(403, NO_AUTH)

    @property
    def has_auth(self) -> bool:
        options = self.application.options
        return bool(options.basic_auth or options.auth)

    @property
    def read_only(self) -> bool:
        return bool(getattr(self.application.options, "read_only", False))  # Flower 2.0 has no such option

    @property
    def extension(self) -> BatchTrack:
        return BatchTrack.of(self.application.capp)

    def settings_of_app(self) -> Settings:
        try:
            return self.extension.settings
        except errors.BatchTrackError:
            return Settings()  # the handler itself says what is wrong with them

    @property
    def snapshots(self) -> Snapshots:
        found: Snapshots = self.application.snapshots
        return found

    async def reading(self, key: Hashable, read: Callable[[Store], T], **how: Any) -> T:
        """What `read` makes of the store, in a thread; `key` names it among all reads, with its arguments."""
        extension = self.extension
        return await self.snapshots.get(key, lambda: read(extension.store), **how)

    async def batch_id(self, text: str) -> uuid.UUID:
        """Of an id, or of its beginning. Raises BatchNotFound."""
        try:
            return uuid.UUID(text) if len(text) >= 32 else await self._resolved(text)
        except ValueError:
            raise errors.BatchNotFound(f"no batch {text!r}") from None

    async def child_key(self, text: str, number: str) -> ChildKey:
        """Of a batch's id, or its beginning, and a position. Raises BatchNotFound."""
        if len(number) > 18:
            raise errors.BatchNotFound(f"no child #{number[:40]}")
        return ChildKey(await self.batch_id(text), int(number))

    async def _resolved(self, text: str) -> uuid.UUID:
        return await self.reading(("resolve", text), lambda store: store.resolve(text))

    def asked(self, name: str) -> str | None:
        """A parameter of the address as it is (Flower's own `get_argument` escapes it)."""
        return self.get_query_argument(name, "") or None

    def asked_number(self, name: str, default: int | None = None, most: int = 2**62, least: int = 0) -> int | None:
        text = self.asked(name)
        if text is None:
            return default
        if not text.isascii() or not text.isdigit() or not least <= int(text[:30]) <= most:
            told = f"{name} must be a whole number from {least} to {most}, not {text[:40]!r}"
            raise Problem(400, "Not understood", told)
        return int(text)

    def asked_limit(self, default: int, most: int) -> int:
        """How many rows are wanted."""
        found = self.asked_number("limit", default, most, least=1)
        assert found is not None
        return found

    def guard_action(self) -> None:
        """Before anything is changed: never in read-only mode, nor for another site's page."""
        if self.read_only:
            raise Problem(403, "Read-only", "Flower runs in read-only mode: nothing can be changed from here.")
        site, origin = self.request.headers.get("Sec-Fetch-Site"), self.request.headers.get("Origin")
        # A proxy may have put its own name in the place of Host; a page cannot set the other header for another site.
        hosts = (self.request.host, self.request.headers.get("X-Forwarded-Host"))
        foreign = site not in (None, "same-origin", "none") or (
            site is None and origin is not None and urlparse(origin).netloc not in hosts
        )
        if foreign:
            advice = ("Behind a proxy, let that pass Host or X-Forwarded-Host on.",)
            raise Problem(403, "Refused", "The request came from another site.", advice)

    @property
    def who(self) -> str:
        """Who acts, for the log: whom Flower has let in."""
        user = self.current_user
        if isinstance(user, str):
            return user
        kind, _, credentials = self.request.headers.get("Authorization", "").partition(" ")
        if not self.application.options.basic_auth or kind != "Basic":
            return "somebody"
        return b64decode(credentials).decode("utf-8", "replace").partition(":")[0]


class PageHandler(Shared):
    """A page. Its template is ``bt_<name>.html``, which is also what refreshes it."""

    name: ClassVar[str] = ""
    tab: ClassVar[str] = "batches"

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.clear_header("Access-Control-Allow-Origin")  # Flower 2.0 lets every site read what has no authentication
        self.set_header("Referrer-Policy", "same-origin")

    @property
    def is_fragment(self) -> bool:
        return bool(self.get_query_argument("fragment", "") == "1")

    def show(self, title: str, *, every: float = 0.0, **data: Any) -> None:
        """Render the page, or only what refreshes. `every`: seconds between two refreshes; 0: it will not change."""
        every = every if self.application.options.auto_refresh else 0.0
        space = {"bt": Namespace(self), "show": show, "title": title, "every": every, "tab": self.tab, **data}
        self.set_header("Cache-Control", "no-cache, private")
        if self.is_fragment:
            self.set_header("X-Batchtrack-Every", f"{every:g}")
            self.render(f"bt_{self.name}.html", **space)
        else:
            self.render("bt_page.html", live=f"bt_{self.name}.html", space=space, message=self._take_message(), **space)

    def tell(self, problem: Problem) -> None:
        self.set_status(problem.status)
        self.set_header("Cache-Control", "no-store")
        retry = 5.0 if problem.status == 503 else 0.0
        space = {
            "bt": Namespace(self), "show": show, "title": problem.title, "tab": self.tab, "problem": problem,
            "every": retry if self.application.options.auto_refresh else 0.0,
        }  # fmt: skip
        if self.is_fragment:
            self.render("bt_problem.html", **space)
        else:
            self.render("bt_page.html", live="bt_problem.html", space=space, message=None, **space)

    def write_error(self, status_code: int, **more: Any) -> None:
        error = (more.get("exc_info") or (None, None))[1]
        if isinstance(error, HTTPError) and status_code in (400, 403, 405) and error.log_message == NO_AUTH:
            self.current_user = None
            self.tell(Problem(403, "Authentication is required", NO_AUTH))
            return
        super().write_error(status_code, **more)

    # -- a message over the next page ---------------------------------------------------------------

    def leave_message(self, kind: str, text: str) -> None:
        """`kind`: done | refused."""
        self.set_secure_cookie(
            _FLASH, json.dumps([kind, text[:600]]), expires_days=None, httponly=True, samesite="Lax", path="/"
        )

    def _take_message(self) -> tuple[str, str] | None:
        try:
            kept = self.get_secure_cookie(_FLASH)
            if not kept:
                return None
            self.clear_cookie(_FLASH, path="/")
            kind, text = json.loads(kept)
        except (ValueError, TypeError):
            return None
        return str(kind), str(text)


class ApiHandler(Shared, BaseApiHandler):  # type: ignore[misc]
    """JSON, behind the authentication of Flower's own API."""

    def answer(self, data: Any, status: int = 200) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.set_header("Cache-Control", "no-cache, private")
        self.finish(jsonio.dumps(data) + "\n")

    def given(self, names: Sequence[str]) -> dict[str, str]:
        """Parameters of an action, from the address, a form or a JSON object. Lists become comma-separated."""
        body: Any = {}
        if self.request.headers.get("Content-Type", "").startswith("application/json") and self.request.body:
            with contextlib.suppress(ValueError):
                body = json.loads(self.request.body)
            if not isinstance(body, dict) or not body:
                raise Problem(400, "", "the body is no JSON object")
        found = {name: self._one_given(body.get(name), name) for name in names}
        return {name: value for name, value in found.items() if value}

    def _one_given(self, value: Any, name: str) -> str:
        if value is None:
            return ",".join(self.get_arguments(name, strip=False))
        if isinstance(value, bool):
            return str(int(value))
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    def tell(self, problem: Problem) -> None:
        self.answer({"error": problem.text, "status": problem.status}, problem.status)

    def write_error(self, status_code: int, **more: Any) -> None:
        error = (more.get("exc_info") or (None, None))[1]
        text = (error.log_message or error.reason) if isinstance(error, HTTPError) else None
        if status_code == 401 and self.application.options.basic_auth:
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        self.answer({"error": text or "internal error, see Flower's log", "status": status_code}, status_code)


class Namespace:
    """What templates ask of their handler: addresses, mostly."""

    def __init__(self, handler: PageHandler) -> None:
        self._handler = handler
        self.read_only = handler.read_only

    def url(self, name: str, /, *args: object, **query: object) -> str:
        """Of one of our pages (``batch``, ``child``, …), with its parameters."""
        path: str = self._handler.reverse_url(f"bt_{name}", *(str(each) for each in args))
        return path + _query(query)

    def asked(self, name: str) -> str | None:
        return self._handler.asked(name)

    def here(self, **changes: object) -> str:
        """This page with other parameters; those that are None are left out."""
        arguments = self._handler.request.query_arguments
        known = {name: values[-1].decode("utf-8", "replace") for name, values in arguments.items()}
        known.pop("fragment", None)
        return str(self._handler.request.path) + _query({**known, **changes})

    def flower(self, name: str, /, *args: str, **query: object) -> str:
        """Of one of Flower's own pages."""
        return str(self._handler.reverse_url(name, *args)) + _query(query)

    def tasks(self, text: object) -> str:
        """Flower's list of tasks, narrowed down to those that have this text in what is shown of them."""
        address = self.flower("tasks")
        if _FLOWER >= (2, 2):  # searches for name:<what is given>
            return f"{address}?name={quote(f'{text} OR {text}')}"
        # Before, `state` alone is taken from the address, and 2.0 reads a comma as the end of a term.
        return f"{address}?state=any,{quote(str(text))}" if _FLOWER < (2, 1) else address

    def static(self, name: str) -> str:
        return self.url("static", name, v=VERSION)

    def task_page(self, task_id: str | None) -> str | None:
        """Flower's page about a task, if Flower still knows it."""
        if not task_id or self._handler.application.events.state.tasks.get(task_id) is None:
            return None
        return self.flower("task", task_id)

    @property
    def token(self) -> str:
        return str(self._handler.xsrf_token, "ascii")

    def sql(self, view: str, where: Mapping[str, object] | None = None, order_by: str = "") -> str:
        """A query on a view that answers what a table shows."""
        return queries.select(view, queries.equal(where or {}), order_by)

    @property
    def queries(self) -> queries.Queries:
        """Those that say a page's filters."""
        return queries.Queries(Words(self._handler.extension.store.sqlite))


def _query(values: Mapping[str, object]) -> str:
    kept = {name: str(value) for name, value in values.items() if value is not None and value != ""}
    return "?" + urlencode(kept) if kept else ""


__all__ = ["ApiHandler", "Namespace", "PageHandler", "Problem", "Silent", "answering", "problem_of"]
