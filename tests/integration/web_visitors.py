"""Who comes to the chat page in the tests: a browser that a person sits at, and a client that speaks its protocol."""

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from html import unescape
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from mmft.chat.web.options import PageOptions, ServeOptions
from mmft.chat.web.server import bind, launch
from mmft.chat.web.turns import Seat
from mmft.inference import Assistant, find_model, load_assistant
from mmft.plugins import load_plugins

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SEND, STOP = "[data-testid=submit-button], .submit-button", "[data-testid=stop-button], .stop-button"
BOX = "#entry textarea"
PATIENCE = 120_000  # milliseconds; a busy machine is no error
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's browser, without a window."""
    if os.environ.get("MMFT_NO_BROWSER") == "1":
        pytest.skip("MMFT_NO_BROWSER=1")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"none of {', '.join(BROWSERS)} found: apt-get install chromium, or set MMFT_NO_BROWSER=1")
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE)
        yield playwright.chromium.launch(executable_path=path, args=FLAGS)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def load(run: Path) -> Assistant:
    return load_assistant(find_model(str(run)), load_plugins(), device=torch.device("cpu"))


@contextmanager
def served(seats: Sequence[Seat], auth: Sequence[str] = (), **options: Any) -> Iterator[str]:
    """The address of a page of this process."""
    from mmft.chat.web.page import build_page

    server = ServeOptions(port=0, auth=auth, max_upload=1)
    with bind(server) as bound, closing(build_page(seats, PageOptions(**options))) as page:
        yield launch(page, server, bound)[0].rstrip("/")


@contextmanager
def visiting(browser: Browser, address: str, locale: str = "en-US") -> Iterator["Visitor"]:
    with closing(browser.new_context(locale=locale)) as context:
        yield Visitor(context.new_page(), address)


class Visitor:
    """One open page, and every request it made."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.requests = page, list[Request]()
        page.set_default_timeout(PATIENCE)
        page.on("request", self.keep)
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_selector(BOX)

    def keep(self, request: Request) -> None:
        self.requests.append(request)

    def ask(self, text: str) -> None:
        expect(self.page.locator(BOX)).to_be_enabled()
        self.page.fill(BOX, text)
        self.page.keyboard.press("Enter")

    def attach(self, *pictures: Path) -> None:
        self.page.set_input_files("input[type=file]", [str(picture) for picture in pictures])
        self.expect_attached(len(pictures))

    def expect_attached(self, count: int) -> None:
        expect(self.page.locator(".thumbnail-item")).to_have_count(count)
        expect(self.page.locator(SEND)).to_be_enabled()

    def expect_answers(self, *answers: str, column: int = 0) -> None:
        expect(self.page.locator(f"#chat-{column} [data-testid=bot]")).to_have_text(list(answers))

    def start_anew(self) -> None:
        self.page.get_by_role("button", name="New chat").click()
        self.expect_answers()

    def hand_over(self, event: str, picture: Path) -> None:
        """Paste a picture into the box, or drop it there, as the browser does: by a DataTransfer with a file."""
        self.page.evaluate(
            """async ([event, name, bytes]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], name, { type: 'image/png' }));
              const box = document.querySelector('#entry textarea');
              const given = { bubbles: true, cancelable: true };
              if (event === 'paste') box.dispatchEvent(new ClipboardEvent('paste', { ...given, clipboardData: data }));
              else for (const kind of ['dragenter', 'dragover', 'drop'])
                box.dispatchEvent(new DragEvent(kind, { ...given, dataTransfer: data }));
            }""",
            [event, picture.name, list(picture.read_bytes())],
        )


class Client:
    """A visitor without a browser: the requests that the page's own script makes, one conversation."""

    def __init__(self, address: str) -> None:
        self.api, self.session = f"{address}/gradio_api", uuid4().hex
        config = json.load(NO_PROXY.open(f"{address}/config"))
        self._values = {part["id"]: part["props"].get("value") for part in config["components"]}
        self._events = {event["id"]: event for event in config["dependencies"]}
        entry = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "entry")
        self.send = next(event for event in self._events.values() if [entry, "submit"] in event["targets"])

    def ask(self, text: str, *files: str) -> str:
        """The answer that the page shows to a question, in a conversation that goes on."""
        self.begin(text, *files)
        answer = self.read(self.join())
        self.post(self._after(self._after(self.send)), None, None)
        return answer

    def begin(self, text: str, *files: str) -> None:
        """Show the question, and close the box. Raises HTTPError where it is refused."""
        given = {"text": text, "files": [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in files]}
        self.post(self.send, given, None, None)

    def join(self) -> str:
        """A place in the queue. Raises HTTPError where it is full."""
        reply = self._after(self.send)
        data = [self._values[part] for part in reply["inputs"]]
        return str(self._post("queue/join", {"data": data, "fn_index": reply["id"]})["event_id"])

    def read(self, place: str) -> str:
        """Wait for the answer of a place in the queue."""
        with NO_PROXY.open(f"{self.api}/queue/data?session_hash={self.session}") as stream:
            for line in stream:
                message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
                if message.get("msg") == "process_completed" and message["event_id"] == place:
                    assert message["success"], message
                    return unescape(message["output"]["data"][1][-1]["content"][-1]["text"])
        raise AssertionError("the answer was lost")

    def upload(self, name: str, content: bytes) -> str:
        """The path of a file on the server. Raises HTTPError where it is refused."""
        head = f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        request = urllib.request.Request(f"{self.api}/upload", head + content + b"\r\n--b--\r\n", kind)
        return str(json.load(NO_PROXY.open(request))[0])

    def event(self, kind: str) -> dict[str, Any]:
        """What a chat area does on `retry` or `edit`."""
        return next(event for event in self._events.values() if any(name == kind for _, name in event["targets"]))

    def post(self, event: dict[str, Any], *data: Any, about: Any = None) -> None:
        """An event with whatever data, as nobody's page would send it. Raises HTTPError where it is refused."""
        self._post("run/predict", {"data": data, "fn_index": event["id"], "event_data": about})

    def _after(self, event: dict[str, Any]) -> dict[str, Any]:
        """What follows an event that went well."""
        return next(e for e in self._events.values() if e["trigger_after"] == event["id"])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        body = {"session_hash": self.session, "event_data": None, "trigger_id": None, **body}
        kind = {"Content-Type": "application/json"}
        with NO_PROXY.open(urllib.request.Request(f"{self.api}/{path}", json.dumps(body).encode(), kind)) as answer:
            return json.load(answer)
