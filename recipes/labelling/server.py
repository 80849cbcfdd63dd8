"""The ranking page: what a labeler sees in the browser. Plain requests, no third party, nothing from the network."""

import resource
import secrets
import socket
import sqlite3
from hashlib import sha256
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import Body, Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from recipes.cli.errors import UserError
from recipes.labelling import accounts
from recipes.labelling.answers import FLAGS, MAX_TEXT, Answer, AnswerError, Review, ranks_of
from recipes.labelling.export import export_command
from recipes.labelling.markdown import render
from recipes.labelling.store import MAX_ID, ConflictError, NotAssignedError, Store

HERE = Path(__file__).parent
MAX_BODY = 1_000_000  # bytes
PAGE_LENGTH = 100  # answers
MAX_CONNECTIONS = 400
ANSWER_SECONDS = 20  # a connection on which nothing was answered for so long is closed
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: browsers would then send forms with "Origin: null", which is refused below.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


# Bounds for what is sent: the database's integers have 64 bits.
Key = Annotated[str, Field(min_length=16, max_length=64)]
EventId = Annotated[int, Field(ge=0, le=MAX_ID)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ReviewBody(_Strict):
    justification: str = ""
    rating: int | None = None
    flags: list[str] = []


class AnswerBody(_Strict):
    prompt_id: str
    action: str
    tiers: list[list[str]]
    reviews: dict[str, ReviewBody] = {}
    comment: str = ""
    key: Key
    revision: EventId
    active_seconds: Seconds = 0.0
    client_time: Annotated[float, Field(allow_inf_nan=False)] | None = None


class LoginNeeded(Exception):
    pass


def create_app(store: Store) -> FastAPI:
    """The application over `store`; `serve` runs it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    templates = Jinja2Templates(directory=HERE / "templates")
    templates.env.filters["formatted"] = render
    # Browsers share cookies between ports: two databases served at once must not end each other's sessions.
    cookie = "labelling_" + sha256(str(store.path.resolve()).encode()).hexdigest()[:8]

    def logged_in(request: Request) -> accounts.Labeler | None:
        session = request.cookies.get(cookie)
        return accounts.session_labeler(store, session) if session else None

    def labeler(request: Request) -> accounts.Labeler:
        found = logged_in(request)
        if not found:
            raise LoginNeeded
        return found

    Me = Annotated[accounts.Labeler, Depends(labeler)]

    def page(request, name, status=200, **context):
        return templates.TemplateResponse(request, name, context, status_code=status)

    def page_of(request, me, name, **context):
        context |= {"me": me, "progress": store.progress(me.id), "key": secrets.token_urlsafe(24)}
        return page(request, name, database=store.path, **context)

    def failure(request, status, text):
        """The one place where a request is refused: JSON for the page's script, a page for people."""
        if request.method not in ("GET", "HEAD"):
            text = f"NOT saved: {text}"
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": text}, status)
        return page(request, "message.html", status, text=text)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        if request.method not in ("GET", "HEAD"):
            too_long = int(request.headers.get("content-length") or MAX_BODY + 1) > MAX_BODY
            if too_long or not _same_origin(request):
                text = "the request is too long" if too_long else "the request came from another site"
                response = failure(request, 413 if too_long else 403, text)
                response.headers.update(HEADERS)
                return response
        response = await call_next(request)
        response.headers.update(HEADERS)
        static = request.url.path.startswith("/static/")
        response.headers["Cache-Control"] = "no-cache" if static else "no-store"
        return response

    @app.exception_handler(LoginNeeded)
    def login_needed(request: Request, _):
        if request.url.path.startswith("/api/"):
            return failure(request, 401, "you are logged out. Log in again in another tab")
        return RedirectResponse("/login", 303)

    def refused(request: Request, error: Exception):
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            return failure(request, 422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")
        if isinstance(error, HTTPException):
            return failure(request, error.status_code, error.detail)
        if isinstance(error, UnicodeEncodeError):  # JSON can hold one, and no file can
            return failure(request, 422, "a text holds half a character")
        if isinstance(error, UserError):
            status = {AnswerError: 422, ConflictError: 409, NotAssignedError: 404}.get(type(error), 400)
            return failure(request, status, str(error))
        return failure(request, 503, f"the server cannot use its database ({error})")

    for kind in (RequestValidationError, HTTPException, UnicodeEncodeError, UserError, sqlite3.Error, OSError):
        app.add_exception_handler(kind, refused)

    @app.get("/login")
    def login_page(request: Request):
        if logged_in(request):  # who goes back in the browser comes here
            return RedirectResponse("/", 303)
        return page(request, "login.html", database=store.path)

    @app.post("/login")
    def login(request: Request, token: Annotated[str, Form()]):
        session = accounts.log_in(store, token)
        if session is None:
            return page(request, "login.html", 401, database=store.path, error="That token is not known here.")
        response = RedirectResponse("/", 303)
        response.set_cookie(
            cookie,
            session,
            max_age=accounts.SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    @app.post("/logout")
    def logout(request: Request):
        accounts.log_out(store, request.cookies.get(cookie, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(cookie)
        return response

    def task_page(request, me, task, is_first=False):
        texts = dict(task.responses)
        context = {"task": task, "store": store, "texts": texts, "ranks": ranks_of(task.answer.tiers)}
        context |= {"letters": dict(zip(texts, ascii_uppercase, strict=False)), "no_review": Review(), "flags": FLAGS}
        context |= {"max_text": MAX_TEXT, "guidelines_open": is_first, "account": f"{cookie} {me.id}"}
        return page_of(request, me, "rank.html", **context)

    @app.get("/")
    def next_task(request: Request, me: Me):
        is_first = not store.has_tasks(me.id)
        task = store.next_task(me.id)
        if task is None:
            return page_of(request, me, "done.html", export_command=export_command)
        return task_page(request, me, task, is_first)

    @app.get("/task/{prompt_id}")
    def task(request: Request, me: Me, prompt_id: str):
        return task_page(request, me, store.task(me.id, prompt_id))

    @app.get("/answers")
    def answers(request: Request, me: Me, before: EventId = MAX_ID):
        found = store.history(me.id, before, PAGE_LENGTH)
        return page_of(request, me, "answers.html", answers=found, page_length=PAGE_LENGTH)

    @app.post("/api/reading")
    def reading(me: Me, prompt_id: Annotated[str, Body()], active_seconds: Annotated[Seconds, Body()]):
        store.add_reading(me.id, prompt_id, active_seconds)
        return {}

    @app.post("/api/answer")
    def answer(me: Me, body: AnswerBody):
        reviews = {id: Review(**vars(review)) for id, review in body.reviews.items()}
        said = Answer(body.tiers, reviews, body.comment)
        sent = (body.key, body.revision, body.active_seconds, body.client_time)
        return {"revision": store.record(me.id, body.prompt_id, body.action, said, *sent)}

    @app.post("/undo")
    def undo(me: Me, event: Annotated[EventId, Form()], key: Annotated[Key, Form()]):
        return RedirectResponse(f"/task/{store.undo(me.id, event, key)}", 303)

    return app


def _same_origin(request):
    """Browsers say where a POST comes from; a page of another site cannot change these headers."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None and site != "same-origin":
        return False
    return origin is not None and urlsplit(origin).netloc == request.headers.get("host")


def serve(store: Store, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves the ranking page until interrupted. Port 0 takes any free one; the address is printed."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --port or --host") from error
    shown = f"[{host}]" if ":" in host else host
    print(f"Ranking page: http://{shown}:{listener.getsockname()[1]}/  (Ctrl+C stops it)", flush=True)
    config = uvicorn.Config(
        create_app(store), http=Connection, backlog=64, log_level="warning", access_log=False, server_header=False
    )
    uvicorn.Server(config).run(sockets=[listener])


class Connection(H11Protocol):
    """Closes idle connections: uvicorn waits forever for unfinished requests and for clients that do not read; many of
    these use up the file handles, so that nobody can save."""

    answered = False

    def connection_made(self, transport):
        super().connection_made(transport)
        self.since = self.loop.time()
        self.loop.call_later(ANSWER_SECONDS, self.close_unless_answered)
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(self.connections) > min(MAX_CONNECTIONS, soft_limit // 2):
            connections: set[Any] = self.connections  # all of them of this class
            oldest = min(connections, key=lambda connection: (connection.answered, connection.since))
            self.connections.discard(oldest)
            oldest.transport.abort()

    def on_response_complete(self):
        self.answered = True
        super().on_response_complete()

    def close_unless_answered(self):
        if not self.answered:
            self.transport.abort()
        elif not self.transport.is_closing():
            self.answered = False
            self.loop.call_later(ANSWER_SECONDS, self.close_unless_answered)
