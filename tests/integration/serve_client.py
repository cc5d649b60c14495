"""`mmft serve` in a process of its own, the clients that ask it, and what they send."""

import base64
import hashlib
import json
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI

QUESTION, SEEN = "What is it?", "A picture."


ENDLESS = {"max_tokens": 100_000, "extra_body": {"repetition_penalty": 0.01}}  # it repeats itself and never ends


POSITIONS = 120_000  # of the models here: nothing but a test ends such an answer


PATIENCE = 300  # seconds, of a client


MAX_UPLOAD = 5  # MB


def connect(address: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=address, api_key=key, max_retries=0, timeout=PATIENCE)


def connect_async(address: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=PATIENCE)


def with_positions(trained: Path) -> Path:
    """A copy of a run, beside it, whose language model has room for an answer without an end."""
    run = Path(shutil.copytree(trained, trained.with_name("long"), dirs_exist_ok=True))
    config, manifest = run / "final/llm/config.json", run / "final/mmft.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": POSITIONS}))
    content = json.loads(manifest.read_text())
    content["files"]["llm/config.json"] = hashlib.sha256(config.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    return run


@contextmanager
def served(
    run: Path, folder: Path, environment: dict[str, str], *options: str, end: signal.Signals, code: int
) -> Iterator[str]:
    """A server on a free port, ended by a signal while it writes an answer; nothing may be left of it."""
    command = [sys.executable, "-m", "mmft", "serve", str(run), "--port", "0", *options]
    with (folder / "log").open("w") as log, subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**environment, "TMPDIR": str(folder)}
    ) as process:  # fmt: skip
        try:
            while "/v1 (Ctrl-C ends)" not in (shown := (folder / "log").read_text()):
                assert process.poll() is None, shown
                time.sleep(0.1)
            address = shown.split(" at ")[1].split()[0]
            yield address
            client = connect(address, environment.get("MMFT_API_KEY", "none"))
            with client.chat.completions.create(model=client.models.list().data[0].id, messages=ask("Count."),
                                                stream=True, **ENDLESS) as answer:  # fmt: skip
                next(iter(answer))
                process.send_signal(end)
                assert process.wait(timeout=600) == code, (folder / "log").read_text()
        finally:
            process.kill()
    assert [path.name for path in folder.iterdir()] == ["log"], "pictures outlive the server"
    assert "Traceback" not in (folder / "log").read_text()


def ask(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def show(url: str, text: str = QUESTION) -> list[Any]:
    return ask([{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}])


def health(address: str) -> dict[str, Any]:
    return dict(httpx.get(address.removesuffix("/v1") + "/health", timeout=PATIENCE).json())


def bomb() -> bytes:
    """A PNG of 100,000 x 100,000 pixels, in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
