"""The chat page in a real browser: headless Chromium from the system, driven by playwright."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from mmft.chat.web import build_page, serve
from mmft.errors import MmftError
from mmft.inference import Assistant, Generation, find_model, load_assistant
from mmft.plugins import load_plugins

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SEND, STOP = "[data-testid=submit-button], .submit-button", "[data-testid=stop-button], .stop-button"


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if os.environ.get("MMFT_NO_BROWSER") == "1":
        pytest.skip("MMFT_NO_BROWSER=1")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"none of {', '.join(BROWSERS)} found: apt-get install chromium, or set MMFT_NO_BROWSER=1")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=FLAGS)


@pytest.fixture(scope="module")
def address(tiny_run: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of `mmft web` in a process of its own, with a temporary folder of its own and a proxy that is dead."""
    port, folder = free_port(), tmp_path_factory.mktemp("web")
    command = [sys.executable, "-m", "mmft", "web", str(tiny_run), "--port", str(port)]
    surroundings = {**environment, "TMPDIR": str(folder), "http_proxy": "http://127.0.0.1:9"}
    with (folder / "log").open("w") as log, subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=surroundings
    ) as server:  # fmt: skip
        while f"open http://127.0.0.1:{port}/" not in (shown := (folder / "log").read_text()):
            assert server.poll() is None, shown
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        server.wait(timeout=20)
    assert [path.name for path in folder.iterdir()] == ["log"], "uploads outlive the server"


@pytest.fixture(scope="module")
def reading(tiny_text_run: Path) -> Assistant:
    return load_assistant(find_model(str(tiny_text_run)), load_plugins(), device=torch.device("cpu"))


class Visitor:
    """One open page, and every request it made."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.requests = page, list[Request]()
        page.on("request", self.keep)
        page.goto(address, wait_until="domcontentloaded")
        page.wait_for_selector("textarea")

    def keep(self, request: Request) -> None:
        self.requests.append(request)

    def ask(self, text: str) -> None:
        expect(self.page.locator("textarea")).to_be_enabled()
        self.page.fill("textarea", text)
        self.page.keyboard.press("Enter")

    def attach(self, *pictures: Path) -> None:
        self.page.set_input_files("input[type=file]", [str(picture) for picture in pictures])
        expect(self.page.locator(".thumbnail-item")).to_have_count(len(pictures))
        expect(self.page.locator(SEND)).to_be_enabled()

    def expect_answers(self, *answers: str) -> None:
        expect(self.page.locator("[data-testid=bot]")).to_have_text(list(answers), timeout=15_000)

    def start_anew(self) -> None:
        self.page.get_by_role("button", name="New chat").click()
        self.expect_answers()


@pytest.fixture
def visitor(browser: Browser, address: str) -> Iterator[Visitor]:
    with closing(browser.new_context()) as context:
        yield Visitor(context.new_page(), address)


def test_a_picture_is_answered_and_no_request_leaves_the_machine(visitor: Visitor, tiny_run: Path) -> None:
    visitor.attach(tiny_run.parent / "red.png")
    visitor.ask("What is it?")
    visitor.expect_answers("A picture.")
    expect(visitor.page.locator("[data-testid=user] img")).to_have_count(1)
    expect(visitor.page.locator("textarea")).to_be_focused()  # to type on
    outside = [r.url for r in visitor.requests if not r.url.startswith((visitor.page.url, "data:", "blob:"))]
    assert (outside, len(visitor.requests) > 10) == ([], True)


def test_several_pictures_go_with_one_question(visitor: Visitor, tiny_run: Path) -> None:
    red = tiny_run.parent / "red.png"
    visitor.attach(red, shutil.copyfile(red, red.with_name("also_red.png")))
    visitor.ask("What is it?")
    expect(visitor.page.locator("[data-testid=bot]")).to_have_count(1)
    expect(visitor.page.locator("[data-testid=user] img")).to_have_count(2)
    expect(visitor.page.locator("[data-testid=bot]")).not_to_contain_text("not answered")


def test_the_model_is_told_of_earlier_turns_until_a_new_chat_and_never_of_another_visitor(
    visitor: Visitor, browser: Browser, address: str
) -> None:
    visitor.ask("Say hello.")
    visitor.expect_answers("Hello there.")
    with closing(browser.new_context()) as context:
        other = Visitor(context.new_page(), address)
        other.ask("Again?")
        other.expect_answers("Again what?")
    visitor.ask("Again?")
    visitor.expect_answers("Hello there.", "Hello again.")
    expect(visitor.page.get_by_role("button", name="New chat")).to_be_enabled()
    visitor.start_anew()
    visitor.ask("Again?")
    visitor.expect_answers("Again what?")


def test_html_is_shown_as_text_and_never_runs(visitor: Visitor, answers: dict[str, str]) -> None:
    visitor.ask("Write HTML.")
    expect(visitor.page.locator("[data-testid=bot]")).to_contain_text("4 spaces")
    assert visitor.page.locator("[data-testid=bot]").inner_text() == answers["Write HTML."]
    mine = '<img src=x onerror="window.ran=2"> &amp; **b** $x$'
    visitor.ask(mine)
    expect(visitor.page.locator("[data-testid=bot]")).to_have_count(2)
    assert visitor.page.locator("[data-testid=user]").nth(1).inner_text() == mine
    visitor.page.wait_for_timeout(300)
    assert visitor.page.evaluate("window.ran") is None
    assert visitor.page.locator("[data-testid=bot] b, [data-testid=bot] img, [data-testid=user] img").count() == 0


def test_a_broken_picture_is_a_message_and_the_chat_goes_on_without_it(visitor: Visitor, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    visitor.attach(tmp_path / "bad.png")
    visitor.ask("What is it?")
    formats = "PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, AVIF"
    visitor.expect_answers(f"⚠ not answered: bad.png: not an image; allowed are {formats}")
    visitor.ask("Again?")  # "Again what?" is the answer to a first question
    expect(visitor.page.locator("[data-testid=bot]").nth(1)).to_have_text("Again what?")


@pytest.mark.parametrize("path", ["/etc/hostname", "mmft/chat/web.py"])
def test_no_file_outside_the_uploads_is_served(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/gradio_api/file={path}")
    assert refused.value.code in (403, 404)


def test_an_upload_of_more_than_20_mb_is_refused(address: str) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    for size, accepted in ((1_000, True), (21_000_000, False)):
        body = head + bytes(size) + b"\r\n--b--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=b"}
        request = urllib.request.Request(f"{address}/gradio_api/upload", body, kind)
        if accepted:
            assert urllib.request.urlopen(request).status == 200
            continue
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == 413


@pytest.fixture
def endless(reading: Assistant) -> Iterator[str]:
    """The page of a model that repeats itself and never ends, so that it answers again only once it was stopped."""
    reading.model.causal_lm.config.max_position_embeddings = 200_000
    generation = Generation(max_new_tokens=100_000, repetition_penalty=0.01)
    with closing(build_page(reading, generation)) as page:
        yield page.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True)[1]


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_stop_keeps_what_was_written_and_frees_the_model(browser: Browser, endless: str) -> None:
    with closing(browser.new_context()) as context:
        visitor = Visitor(context.new_page(), endless)
        assert visitor.page.locator("input[type=file]").count() == 0  # a text model has no control for pictures
        for turn in range(2):
            visitor.ask("Say hello.")
            answer = visitor.page.locator("[data-testid=bot]").nth(turn)
            expect(answer).not_to_be_empty()
            visitor.page.locator(STOP).click()
            expect(visitor.page.locator("textarea")).to_be_enabled()
            kept = answer.inner_text()
            visitor.page.wait_for_timeout(500)
            assert answer.inner_text() == kept != ""


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")
def test_a_closed_page_frees_the_model(browser: Browser, endless: str) -> None:
    for _ in range(2):
        with closing(browser.new_context()) as context:
            visitor = Visitor(context.new_page(), endless)
            visitor.ask("Say hello.")
            expect(visitor.page.locator("[data-testid=bot]")).not_to_be_empty(timeout=10_000)


def test_a_port_in_use_is_one_clear_error(reading: Assistant) -> None:
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        pytest.raises(
            MmftError, match=r"^cannot serve on 127\.0\.0\.1:\d+: Address already in use; give another --port"
        ),
    ):
        serve(reading, port=taken.getsockname()[1])


def test_without_gradio_the_error_says_what_to_install(reading: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MmftError, match=r'^the page needs gradio; run: pip install "mmft\[web\]"$'):
        serve(reading, port=free_port())
