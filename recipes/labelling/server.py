"""The ranking page: what a labeler sees in the browser. Plain requests, no third party, nothing from the network."""

import resource
import secrets
import socket
import sqlite3
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from fastapi.templating import Jinja2Templates
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from recipes.cli.errors import UserError
from recipes.labelling import accounts, answers
from recipes.labelling.export import export_command
from recipes.labelling.markdown import render
from recipes.labelling.store import ConflictError, NotAssignedError, Store

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


def create_app(store: Store) -> FastAPI:
    """The application over `store`; `serve` runs it."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    templates = Jinja2Templates(directory=HERE / "templates")
    templates.env.filters["formatted"] = render
    templates.env.globals |= {"store": store, "flags": answers.FLAGS, "max_text": answers.MAX_TEXT}
    # Browsers share cookies between ports: two databases served at once must not end each other's sessions.
    cookie = "labelling_" + sha256(str(store.path.resolve()).encode()).hexdigest()[:8]

    def logged_in(request):
        return accounts.session_labeler(store, request.cookies.get(cookie, ""))

    def account(me):
        """Sent back by the page, as somebody else may have logged in in another tab."""
        return f"{cookie} {me.id}"

    def labeler(request: Request) -> accounts.Labeler:
        if found := logged_in(request):
            if request.headers.get("x-account", account(found)) != account(found):
                raise HTTPException(401, f"{found.name} is logged in now. Log in again as yourself in another tab")
            return found
        if request.url.path.startswith("/api/"):
            raise HTTPException(401, "you are logged out. Log in again in another tab")
        raise HTTPException(303, headers={"Location": "/login"})

    Me = Annotated[accounts.Labeler, Depends(labeler)]

    def page(request, name, me=None, status=200, **context):
        if me:
            context |= {"me": me, "progress": store.progress(me.id), "key": secrets.token_urlsafe(24)}
        return templates.TemplateResponse(request, name, context, status_code=status)

    def failure(request, status, text):
        """The one place where a request is refused: JSON for the page's script, a page for people."""
        if request.method not in ("GET", "HEAD"):
            text = f"NOT saved: {text}"
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": text}, status)
        return page(request, "message.html", status=status, text=text)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        changes = request.method not in ("GET", "HEAD")
        if changes and int(request.headers.get("content-length") or MAX_BODY + 1) > MAX_BODY:
            response = failure(request, 413, "the request is too long")
        elif changes and not _same_origin(request):
            response = failure(request, 403, "the request came from another site")
        else:
            response = await call_next(request)
        static = request.url.path.startswith("/static/")
        response.headers.update(HEADERS | {"Cache-Control": "no-cache" if static else "no-store"})
        return response

    def refused(request: Request, error: Exception):
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            return failure(request, 422, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")
        if isinstance(error, HTTPException):
            response = failure(request, error.status_code, error.detail)
            response.headers.update(error.headers or {})
            return response
        if isinstance(error, UserError):
            status = {answers.AnswerError: 422, ConflictError: 409, NotAssignedError: 404}.get(type(error), 400)
            return failure(request, status, str(error))
        return failure(request, 503, f"the server cannot use its database ({error})")

    for kind in (RequestValidationError, HTTPException, UserError, sqlite3.Error, OSError):
        app.add_exception_handler(kind, refused)

    @app.get("/login")
    def login_page(request: Request):
        if logged_in(request):  # who goes back in the browser comes here
            return RedirectResponse("/", 303)
        return page(request, "login.html")

    @app.post("/login")
    def login(request: Request, token: Annotated[str, Form()]):
        session = accounts.log_in(store, token)
        if session is None:
            return page(request, "login.html", status=401, error="That token is not known here.")
        response = RedirectResponse("/", 303)
        safe = request.url.scheme == "https"
        age = accounts.SESSION_SECONDS
        response.set_cookie(cookie, session, max_age=age, httponly=True, samesite="strict", secure=safe)
        return response

    @app.post("/logout")
    def logout(request: Request):
        accounts.log_out(store, request.cookies.get(cookie, ""))
        response = RedirectResponse("/login", 303)
        response.delete_cookie(cookie)
        return response

    @app.get("/")
    @app.get("/task/{prompt_id}")
    def task(request: Request, me: Me, prompt_id: str = ""):
        found = store.task(me.id, prompt_id) if prompt_id else store.next_task(me.id)
        if found is None:
            return page(request, "done.html", me, export_command=export_command(store.path))
        return page(request, "rank.html", me, task=found, account=account(me))

    @app.get("/answers")
    def history(request: Request, me: Me, before: answers.EventId = answers.MAX_ID):
        found = store.history(me.id, before, PAGE_LENGTH)
        return page(request, "answers.html", me, answers=found, page_length=PAGE_LENGTH)

    @app.post("/api/answer")
    def answer(me: Me, sent: answers.Submission):
        return {"revision": store.record(me.id, sent)}

    @app.post("/undo")
    def undo(me: Me, event: Annotated[answers.EventId, Form()], key: Annotated[answers.Key, Form()]):
        return RedirectResponse(f"/task/{store.undo(me.id, event, key)}", 303)

    return app


def _same_origin(request):
    """Browsers say where a POST comes from; a page of another site cannot change these headers."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin", "")
    return site in (None, "same-origin") and origin.partition("://")[2] == request.headers.get("host")


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

    def connection_made(self, transport):
        super().connection_made(transport)
        self.wait_for_answer()
        soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if len(self.connections) > min(MAX_CONNECTIONS, soft_limit // 2):
            connections: set[Any] = self.connections  # all of them of this class
            oldest = min(connections, key=lambda connection: connection.waits_since)
            self.connections.discard(oldest)
            oldest.transport.abort()

    def wait_for_answer(self):
        self.waits_since = self.loop.time()
        self.patience = self.loop.call_later(ANSWER_SECONDS, self.transport.abort)

    def on_response_complete(self):
        self.patience.cancel()
        self.wait_for_answer()
        super().on_response_complete()
