"""The pictures of requests, as files in the server's own folder: uploaded to stay, or sent along with one question.

Nothing else is ever opened: no path and no address that a request names.
"""

import base64
import binascii
import hashlib
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any
from uuid import uuid4

from mmft.chat.server.errors import Refused
from mmft.errors import DataError
from mmft.images import image_size

MAX_STORED = 1_000_000_000  # bytes of uploaded files, together
ADVICE = "send it as data:image/png;base64,..., or upload it to /v1/files and give its id"


@dataclass(frozen=True)
class Upload:
    """A file under /v1/files."""

    path: Path
    name: str
    purpose: str
    size: int
    id: str = field(default_factory=lambda: f"file-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def card(self) -> dict[str, Any]:
        """As OpenAI describes a file."""
        return {
            "id": self.id, "object": "file", "bytes": self.size, "created_at": self.created, "filename": self.name,
            "purpose": self.purpose, "status": "processed",
        }  # fmt: skip


class Pictures:
    """Files in `folder`. One that came within a request bears its hash as a name, so that `Memory` knows it again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uploads: dict[str, Upload] = {}
        self._held: Counter[Path] = Counter()
        self._lock = Lock()

    @property
    def uploads(self) -> tuple[Upload, ...]:
        """In the order they came in."""
        return tuple(self._uploads.values())

    def upload(self, content: bytes, name: str, purpose: str) -> Upload:
        """Keep a file until it is deleted, or the server ends. Raises `Refused` for one that is no picture."""
        with self._lock:
            if sum(upload.size for upload in self.uploads) + len(content) > MAX_STORED:
                full = f"the server holds {MAX_STORED:,} bytes of files at most; delete some with DELETE /v1/files/ID"
                raise Refused(full, status=413, param="file", code="storage_full")
            upload = Upload(self._folder / uuid4().hex, name, purpose, len(content))
            self._uploads[upload.id] = upload
        try:
            _write(upload.path, content, name or "file", "file")
        except Refused:
            self.delete(upload.id)
            raise
        return upload

    def find(self, number: str) -> Upload:
        """Raises `Refused` where there is none."""
        upload = self._uploads.get(number)
        if upload is None:
            raise Refused(f"there is no file {number!r} here", status=404, param="file_id", code="file_not_found")
        return upload

    def delete(self, number: str) -> None:
        """Raises `Refused` where there is none."""
        upload = self.find(number)
        self._uploads.pop(number, None)
        upload.path.unlink(missing_ok=True)

    def hold(self, url: str, where: str) -> Path:
        """The file of a picture in a message: a data URL, or the id of an upload. It stays until it is released.

        Raises `Refused` for anything else, and for what is no picture.
        """
        if url.startswith(("http://", "https://")):
            reason = "pictures are not fetched from the network, because the server reaches what a caller may not"
            raise Refused(f"{where}: {reason}; {ADVICE}", param=where, code="invalid_image_url")
        if not url.startswith("data:"):
            if upload := self._uploads.get(url):
                return upload.path
            found = f"{url[:60]!r} is neither a data: URL nor the id of an uploaded file"
            raise Refused(f"{where}: {found}; {ADVICE}", param=where, code="invalid_image_url")
        content = _decoded(url, where)
        path = self._folder / f"sent-{hashlib.sha256(content).hexdigest()}"
        with self._lock:
            self._held[path] += 1
            new = self._held[path] == 1
            try:
                if new:
                    _write(path, content, where, where)
            except Refused:
                del self._held[path]
                path.unlink(missing_ok=True)
                raise
        return path

    def release(self, paths: Iterable[Path]) -> None:
        """Delete those that no other request holds; uploads stay."""
        with self._lock:
            for path in paths:
                if path not in self._held:
                    continue
                self._held[path] -= 1
                if not self._held[path]:
                    del self._held[path]
                    path.unlink(missing_ok=True)


def _decoded(url: str, where: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Refused(f"{where}: a data: URL must go data:image/png;base64,...", param=where, code="invalid_image_url")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise Refused(f"{where}: the picture is no base64: {error}", param=where, code="invalid_base64") from error


def _write(path: Path, content: bytes, name: str, param: str) -> None:
    """Write a file and read its header: its format and how many pixels it has."""
    path.write_bytes(content)
    try:
        image_size(path)
    except DataError as error:
        raise Refused(str(error).replace(str(path), name), param=param, code="invalid_image") from error
