"""An endpoint for OpenAI's clients: Starlette over the same model, template and memory as chat and page.

Who asks sends the whole history with each question, so nothing is kept of a conversation but what `Memory` has
computed for the last one.
"""

import hmac
import logging
import signal
import socket
import tempfile
from asyncio import create_task, to_thread
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmft.chat.address import LOCAL, take_address, unusable
from mmft.chat.server.answer import Answer
from mmft.chat.server.desk import Desk, Job
from mmft.chat.server.errors import Refused
from mmft.chat.server.pictures import Pictures
from mmft.chat.server.request import Reader
from mmft.errors import MmftError
from mmft.inference import Assistant, Generation

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("mmft")
PURPOSES = ("vision", "user_data")
GRACE = 5  # seconds for those who are told that the server ends


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the server listens and what it takes; `max_upload` are MB of a request with its pictures."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    max_waiting: int = 64
    max_upload: int = 50
    max_context: int | None = None


def bind(options: ServerOptions) -> socket.socket:
    """The server's socket, before a model is loaded. It does not listen yet, so nobody waits for the model.

    Raises `MmftError` where the address cannot be used, or the packages of the server are missing.
    """
    missing = [name for name in ("starlette", "uvicorn", "python_multipart") if find_spec(name) is None]
    if missing:
        raise MmftError(f'the server needs {", ".join(missing)}; run: pip install "mmft[serve]"')
    bound = take_address(options.host, options.port)
    if options.host not in LOCAL and not options.api_key:
        log.warning("%s: everybody who reaches this machine can ask; --api-key (MMFT_API_KEY) sets a key", options.host)
    return bound


def serve(assistant: Assistant, name: str, defaults: Generation, options: ServerOptions, bound: socket.socket) -> None:
    """Answer until SIGTERM (which returns) or Ctrl-C (`KeyboardInterrupt`). Uploads are deleted with the server."""
    import uvicorn

    with tempfile.TemporaryDirectory(prefix="mmft-serve-") as folder, bound:
        pictures = Pictures(Path(folder))
        desk = Desk(assistant, pictures, max_waiting=options.max_waiting, max_context=options.max_context)
        reader = Reader(name, assistant.template, assistant.sees, defaults, pictures)
        config = uvicorn.Config(
            build_app(reader, desk, options), log_level="warning", access_log=False, ws="none",
            timeout_graceful_shutdown=GRACE,
        )  # fmt: skip

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: Any) -> None:
                desk.stop()  # else uvicorn would wait for the answers
                super().handle_exit(sig, frame)

        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it has ended
        try:
            bound.listen()
        except OSError as error:  # somebody listens there by now, as Linux lets those who reuse addresses
            raise MmftError(unusable(options.host, options.port, error)) from error
        host = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving {name} at http://{host}:{bound.getsockname()[1]}/v1 (Ctrl-C ends)", flush=True)  # noqa: T201
        Server(config).run(sockets=[bound])


def build_app(reader: Reader, desk: Desk, options: ServerOptions) -> "Starlette":
    """The application. It closes the desk when it ends."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await to_thread(desk.close)

    max_body = options.max_upload * 1_000_000
    endpoints = Endpoints(reader, desk, max_body)
    cors = Middleware(CORSMiddleware, allow_origins=options.cors, allow_methods=["*"], allow_headers=["*"])
    return Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.model),
            Route("/v1/chat/completions", Completions(reader, desk, max_body), methods=["POST"]),
            Route("/v1/files", endpoints.upload, methods=["POST"]),
            Route("/v1/files", endpoints.files),
            Route("/v1/files/{id}", endpoints.file),
            Route("/v1/files/{id}", endpoints.delete, methods=["DELETE"]),
        ],
        middleware=[*([cors] if options.cors else []), Middleware(Gate, api_key=options.api_key, origins=options.cors)],
        exception_handlers=dict.fromkeys((Refused, HTTPException, ClientDisconnect, Exception), _refusal),
        lifespan=lifespan,
    )


class Gate:
    """Lets in who has the key, and no page of a browser that `--cors` does not name.

    A browser sends pages' questions to this machine without asking, only the answers need CORS; so their origin is
    looked at here, before anything is run or stored.
    """

    def __init__(self, app: "ASGIApp", *, api_key: str | None, origins: tuple[str, ...]) -> None:
        self._app, self._key, self._origins = app, api_key, origins

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """As ASGI asks."""
        if scope["type"] == "http" and (refused := self._refused(scope)):
            await _response(refused)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refused(self, scope: "Scope") -> Refused | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get(b"origin")
        if origin and origin not in self._origins and "*" not in self._origins:
            return Refused(f"pages of {origin} may not ask here; --cors {origin} lets them", status=403)
        if self._key is None or not scope["path"].startswith("/v1"):
            return None
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key.encode()):
            return None
        return Refused("the API key is missing or wrong", status=401, code="invalid_api_key")


class Endpoints:
    """What the addresses do."""

    def __init__(self, reader: Reader, desk: Desk, max_body: int) -> None:
        self._reader, self._desk, self._pictures, self._max_body = reader, desk, reader.pictures, max_body
        limit = {"max_model_len": desk.max_context} if desk.max_context else {}
        self._card = {"id": reader.name, "object": "model", "created": 0, "owned_by": "mmft", **limit}

    async def health(self, request: "Request") -> "Response":
        """Alive, and how busy."""
        desk = self._desk
        return _json({
            "status": "ok", "model": self._reader.name, "in_progress": desk.in_progress, "answered": desk.answered,
            "cancelled": desk.cancelled,
        })  # fmt: skip

    async def models(self, request: "Request") -> "Response":
        """The one model."""
        return _json({"object": "list", "data": [self._card]})

    async def model(self, request: "Request") -> "Response":
        """The one model by its name."""
        if (asked := request.path_params["name"]) != self._reader.name:
            there = f"there is no model {asked!r} here, but {self._reader.name!r}"
            raise Refused(there, status=404, param="model", code="model_not_found")
        return _json(self._card)

    async def upload(self, request: "Request") -> "Response":
        """Keep a picture, to be referred to by its id."""
        from starlette.datastructures import UploadFile
        from starlette.requests import Request

        if not self._reader.sees:
            raise Refused("this is a text model, it takes no pictures")
        limited = Request(request.scope, _limited(request, self._max_body))
        with self._desk.place():
            async with limited.form(max_files=1, max_fields=8) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise Refused("the form has no file in its field 'file'", param="file")
                if not isinstance(purpose, str) or purpose not in PURPOSES:
                    raise Refused(f"purpose is {purpose!r}; allowed are {', '.join(PURPOSES)}", param="purpose")
                name = Path(file.filename or "").name
                upload = await to_thread(self._pictures.upload, await file.read(), name, purpose)
        return _json(upload.card)

    async def files(self, request: "Request") -> "Response":
        """All uploads."""
        return _json({"object": "list", "data": [upload.card for upload in self._pictures.uploads], "has_more": False})

    async def file(self, request: "Request") -> "Response":
        """What is known of an upload; its content is not given out."""
        return _json(self._pictures.find(request.path_params["id"]).card)

    async def delete(self, request: "Request") -> "Response":
        """Forget an upload."""
        number = request.path_params["id"]
        self._pictures.delete(number)
        return _json({"id": number, "object": "file", "deleted": True})


class Completions:
    """/v1/chat/completions, as an ASGI application of its own: its place in the queue ends with the response."""

    def __init__(self, reader: Reader, desk: Desk, max_body: int) -> None:
        self._reader, self._desk, self._max_body = reader, desk, max_body

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer. A stream begins with its first piece, so that errors before it have a status of their own."""
        from starlette.requests import ClientDisconnect, Request

        with self._desk.place():
            try:
                body = await Request(scope, _limited(Request(scope, receive), self._max_body)).body()
            except ClientDisconnect:
                self._desk.cancelled += 1
                raise
            job = Job(await to_thread(self._reader.read, body))
            del body  # its pictures are files by now
            await self._answer(job, scope, receive, send)

    async def _answer(self, job: Job, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.responses import StreamingResponse

        watch = create_task(_leave_with_client(receive, job))
        try:
            self._desk.put(job)
            answer = Answer(self._reader.name, job)
            response: Response
            if job.ask.stream:
                events = answer.stream(await job.next())
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                response = StreamingResponse(events, media_type="text/event-stream", headers=headers)
            else:
                response = _json(await answer.whole())
            watch.cancel()
            await response(scope, receive, send)
        finally:
            job.gone.set()
            watch.cancel()


async def _leave_with_client(receive: "Receive", job: Job) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.leave()


def _limited(request: "Request", limit: int) -> "Receive":
    """The body of a request, refused while it comes as soon as it is too large."""
    too_large = Refused(
        f"the request has more than {limit:,} bytes (--max-upload); send smaller pictures",
        status=413, code="request_too_large",
    )  # fmt: skip
    taken = 0

    async def receive() -> "Message":
        nonlocal taken
        declared = request.headers.get("content-length", "")
        message = await request.receive() if not declared.isdigit() or int(declared) <= limit else None
        taken += len(message.get("body", b"")) if message else limit + 1
        if message is None or taken > limit:
            raise too_large
        return message

    return receive


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(content, status, headers)


def _response(error: Refused) -> "Response":
    headers = {401: {"WWW-Authenticate": "Bearer"}, 413: {"Connection": "close"}, 503: {"Retry-After": "1"}}
    return _json(error.body, error.status, headers.get(error.status))


async def _refusal(request: "Request", error: Exception) -> "Response":
    """Every error in OpenAI's form, those of Starlette too."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    if isinstance(error, HTTPException):
        what = f"{request.method} {request.url.path}: {error.detail}"
        error = Refused(what, status=error.status_code)
    elif isinstance(error, ClientDisconnect):
        error = Refused("the client left", status=499)
    elif not isinstance(error, Refused):
        error = Refused(f"{type(error).__name__}; see the log of mmft serve", status=500)
    return _response(error)
