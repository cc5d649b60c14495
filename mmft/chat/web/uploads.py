"""How much visitors may leave in the folder of a page, all of them together."""

import os
from asyncio import to_thread
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PICTURES = 100  # of the largest size allowed
SAVED = "saved"  # the folder in it of what visitors take along, which has a bound of its own
SMALLEST = 4096  # bytes; an empty file takes a place too


def stored(folder: Path) -> int:
    """Bytes of all files in a folder but those of `SAVED` in it. Those that vanish meanwhile count nothing."""
    total = 0
    for inner, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != SAVED]
        for name in names:
            with suppress(OSError):
                total += max((Path(inner) / name).stat().st_size, SMALLEST)
    return total


class UploadBound:
    """Refuses uploads that the folder has no room for, before gradio reads them.

    Gradio 6.31 bounds each file only. Uploads on their way count with the length that they declare.
    """

    def __init__(self, app: "ASGIApp", *, folder: Path, limit: int) -> None:
        self._app, self._folder, self._limit, self._coming = app, folder, limit, 0

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """As ASGI asks."""
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"").decode("latin-1")
        if not declared.isdigit():
            await _refuse(411, "the upload does not say how many bytes it has", scope, receive, send)
            return
        size = int(declared)
        self._coming += size
        try:
            if await to_thread(stored, self._folder) + self._coming > self._limit:
                await self._full(size, scope, receive, send)
            else:
                await self._app(scope, receive, send)
        finally:
            self._coming -= size

    async def _full(self, size: int, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Read what comes, if it is not too much: a browser that cannot send it all does not read why."""
        more = size <= self._limit
        while more:
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
        line = f"all uploads together may have {self._limit:,} bytes, and there is no room for this one; try tomorrow"
        await _refuse(413, line, scope, receive, send)


async def _refuse(status: int, line: str, scope: "Scope", receive: "Receive", send: "Send") -> None:
    from starlette.responses import PlainTextResponse

    await PlainTextResponse(line, status, {"Connection": "close"})(scope, receive, send)
