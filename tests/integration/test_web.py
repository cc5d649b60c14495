"""The page of `mmft web` in a process of its own: a real browser, and clients that speak its protocol."""

import json
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier

import pytest
from playwright.sync_api import Browser, expect
from web_visitors import BOX, NO_PROXY, Client, Visitor, chromium

from mmft.chat.transcript import read_transcript

FORMATS = "PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, AVIF"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(tiny_run: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page, with a temporary folder of its own and a proxy that is dead."""
    folder = tmp_path_factory.mktemp("web")
    pictures = folder.parent / "web-examples"
    pictures.mkdir()
    shutil.copyfile(tiny_run.parent / "red.png", pictures / "red.png")
    command = [sys.executable, "-m", "mmft", "web", str(tiny_run), "--port", "0", "--examples", str(pictures),
               "--max-new-tokens", "100"]  # fmt: skip
    surroundings = {**environment, "TMPDIR": str(folder), "http_proxy": "http://127.0.0.1:9"}
    with (folder / "log").open("w") as log, subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=surroundings
    ) as server:  # fmt: skip
        while not (opened := re.search(r"open (http://127\.0\.0\.1:\d+)/ ", shown := (folder / "log").read_text())):
            assert server.poll() is None, shown
            time.sleep(0.1)
        yield opened[1]
        server.terminate()
        server.wait(timeout=600)
    assert [path.name for path in folder.iterdir()] == ["log"], "uploads outlive the server"


@pytest.fixture
def visitor(browser: Browser, address: str) -> Iterator[Visitor]:
    with closing(browser.new_context()) as context:
        yield Visitor(context.new_page(), address)


def test_a_picture_is_answered_and_no_request_leaves_the_machine(visitor: Visitor, tiny_run: Path) -> None:
    visitor.attach(tiny_run.parent / "red.png")
    visitor.ask("What is it?")
    visitor.expect_answers("A picture.")
    expect(visitor.page.locator("[data-testid=user] img")).to_have_count(1)
    expect(visitor.page.locator(BOX)).to_be_focused()  # to type on
    outside = [r.url for r in visitor.requests if not r.url.startswith((visitor.page.url, "data:", "blob:"))]
    assert (outside, len(visitor.requests) > 10) == ([], True)


def test_pictures_are_uploaded_pasted_and_dropped_for_one_question(visitor: Visitor, tiny_run: Path) -> None:
    red = tiny_run.parent / "red.png"
    visitor.attach(red)
    visitor.hand_over("paste", shutil.copyfile(red, red.with_name("pasted.png")))
    visitor.expect_attached(2)
    visitor.hand_over("drop", shutil.copyfile(red, red.with_name("dropped.png")))
    visitor.expect_attached(3)
    visitor.ask("What is it?")
    expect(visitor.page.locator("[data-testid=bot]")).to_have_count(1)
    expect(visitor.page.locator("[data-testid=user] img")).to_have_count(3)
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


def test_a_past_question_is_edited_and_the_last_one_asked_again(visitor: Visitor) -> None:
    visitor.ask("Say hello.")
    visitor.expect_answers("Hello there.")
    visitor.ask("Again?")
    visitor.expect_answers("Hello there.", "Hello again.")
    expect(visitor.page.locator(BOX)).to_be_enabled()
    visitor.page.get_by_role("button", name="Edit").first.click()
    visitor.page.locator(".edit-textarea").fill("What is it? <b>")
    visitor.page.locator("#chat-0").get_by_role("button", name="Submit").click()
    expect(visitor.page.locator("[data-testid=user]")).to_have_count(1)  # what came after it is gone
    expect(visitor.page.locator(BOX)).to_be_enabled()
    visitor.page.get_by_role("button", name="Edit").click()
    expect(visitor.page.locator(".edit-textarea")).to_have_value("What is it? <\u2060b>")
    visitor.page.locator(".edit-textarea").fill("Again?")
    visitor.page.locator("#chat-0").get_by_role("button", name="Submit").click()
    visitor.expect_answers("Again what?")
    expect(visitor.page.locator(BOX)).to_be_enabled()
    with visitor.page.expect_request("**/queue/join*"):
        visitor.page.get_by_role("button", name="Retry").click()
    expect(visitor.page.locator(BOX)).to_be_enabled()
    visitor.expect_answers("Again what?")


def test_a_downloaded_conversation_is_what_load_reads(visitor: Visitor, tiny_run: Path, tmp_path: Path) -> None:
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.fill("#system textarea", "You see.")
    visitor.page.get_by_role("button", name="Toggle Sidebar").click()
    for name, pictures in (("conversation.json", []), ("conversation.zip", [tiny_run.parent / "red.png"])):
        if pictures:
            visitor.attach(*pictures)
        visitor.ask("What is it?")
        expect(visitor.page.locator("[data-testid=bot]")).to_have_count(1 + len(pictures))
        expect(visitor.page.get_by_role("button", name="New chat")).to_be_enabled()
        with visitor.page.expect_download() as download:
            visitor.page.get_by_role("button", name="Download").click()
        download.value.save_as(tmp_path / name)
        assert download.value.suggested_filename == name
    roles = [message.role for message in read_transcript(tmp_path / "conversation.json").messages]
    assert roles == ["system", "user", "assistant"]
    zipfile.ZipFile(tmp_path / "conversation.zip").extractall(tmp_path)
    content = json.loads((tmp_path / "conversation.json").read_text("utf-8"))
    assert [part.get("path") for part in content["messages"][3]["content"]] == ["pictures/1-red.png", None]
    assert (tmp_path / "pictures/1-red.png").read_bytes() == (tiny_run.parent / "red.png").read_bytes()


def test_the_panel_changes_how_answers_are_drawn(visitor: Visitor) -> None:
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("number input for Most new tokens").fill("1")
    visitor.page.get_by_role("button", name="Toggle Sidebar").click()
    visitor.ask("Say hello.")
    expect(visitor.page.locator("[data-testid=bot]")).to_have_count(1)
    expect(visitor.page.locator(BOX)).to_be_enabled()
    short = visitor.page.locator("[data-testid=bot]").inner_text()
    assert short != "Hello there." and "Hello there.".startswith(short.strip())
    visitor.page.get_by_role("button", name="Settings").click()
    visitor.page.get_by_label("Seed (empty: random)").fill("much")
    visitor.ask("Say hello.")
    visitor.expect_answers(short, "⚠ not answered: seed=much: allowed is a whole number")


def test_an_example_fills_the_box(visitor: Visitor) -> None:
    visitor.page.get_by_role("button", name="What is in this picture?").click()
    expect(visitor.page.locator(BOX)).to_have_value("What is in this picture?")
    visitor.page.locator("#examples .picture").click()
    visitor.expect_attached(1)
    visitor.ask("What is it?")
    visitor.expect_answers("A picture.")
    expect(visitor.page.locator("#examples")).to_be_hidden()


def test_html_is_shown_as_text_and_never_runs(visitor: Visitor, answers: dict[str, str]) -> None:
    visitor.ask("Write HTML.")
    expect(visitor.page.locator("[data-testid=bot]")).to_contain_text("4 spaces")
    assert visitor.page.locator("[data-testid=bot]").inner_text() == answers["Write HTML."]
    mine = '<img src=x onerror="window.ran=2"> &amp; **b** $x$ <script>window.ran=3</script><!-- a -->'
    visitor.ask(mine)
    expect(visitor.page.locator("[data-testid=bot]")).to_have_count(2)
    assert visitor.page.locator("[data-testid=user]").nth(1).inner_text().replace("\u2060", "") == mine
    expect(visitor.page.locator(BOX)).to_be_enabled()
    visitor.ask("Say hello.")  # a whole answer later, everything of the one before was loaded or refused
    expect(visitor.page.locator("[data-testid=bot]")).to_have_count(3)
    expect(visitor.page.locator(BOX)).to_be_enabled()
    assert visitor.page.evaluate("window.ran") is None
    assert visitor.page.locator("[data-testid=bot] b, [data-testid=bot] img, [data-testid=user] img").count() == 0


def test_a_broken_picture_is_a_message_and_the_chat_goes_on_without_it(visitor: Visitor, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    visitor.attach(tmp_path / "bad.png")
    visitor.ask("What is it?")
    visitor.expect_answers(f"⚠ not answered: bad.png: not an image; allowed are {FORMATS}")
    visitor.ask("Again?")  # "Again what?" is the answer to a first question
    expect(visitor.page.locator("[data-testid=bot]").nth(1)).to_have_text("Again what?")


def test_of_32_clients_at_once_each_gets_its_own_answer(address: str) -> None:
    known = {"Say hello.": "Hello there.", "Again?": "Again what?", "What is it?": "I see nothing."}
    barrier = Barrier(32)

    def talk(number: int) -> tuple[str, str, str]:
        client, question = Client(address), list(known)[number % 3]
        barrier.wait()
        return question, client.ask(question), client.ask("Again?") if number % 3 == 0 else "Hello again."

    with ThreadPoolExecutor(32) as pool:
        for question, first, second in pool.map(talk, range(32)):
            assert (first, second) == (known[question], "Hello again.")


def test_a_second_question_of_a_visitor_waits_for_the_answer_to_the_first(address: str) -> None:
    client = Client(address)
    client.begin("Say hello.")
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.begin("Again?")
    assert "One question at a time" in refused.value.read().decode()
    assert client.read(client.join()) == "Hello there."


def test_asking_again_where_nothing_was_asked_or_a_wrong_edit_does_nothing(address: str) -> None:
    client = Client(address)
    wrong = (None, {}, {"index": None, "value": "x"}, {"index": 7, "value": "x"}, {"index": [], "value": "x"}, "x")
    for kind, about in (("retry", None), *(("edit", given) for given in wrong)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            client.post(client.event(kind), None, None, about=about)
        answer = json.load(refused.value)
        assert (answer["error"], answer["visible"]) == ("", False), (kind, about)
    assert client.ask("Say hello.") == "Hello there."
    for about in (None, {"index": -1, "value": "x"}, {"index": 0, "value": None}, {"index": 2, "value": "x"}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            client.post(client.event("edit"), None, None, about=about)
        assert json.load(refused.value)["error"] == "", about
    assert client.ask("Again?") == "Hello again."


def bomb() -> bytes:
    """A PNG of a few bytes whose header speaks of 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [(b"no picture", "a.png: not an image; allowed are PNG"), (bomb(), "a.png: more than 178,956,970 pixels; at most")],
    ids=["a text file named .png", "an image bomb"],
)
def test_a_file_that_is_no_picture_is_refused_in_one_line(address: str, content: bytes, line: str) -> None:
    client = Client(address)
    answer = client.ask("What is it?", client.upload("a.png", content))
    assert answer.startswith(f"⚠ not answered: {line}") and "\n" not in answer
    assert client.ask("Again?") == "Again what?"


def test_a_large_upload_is_refused_and_the_server_goes_on(address: str) -> None:
    client = Client(address)
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.upload("a.png", bytes(21_000_000))
    line = b"File size exceeded maximum allowed size of 20000000 bytes."
    assert (refused.value.code, refused.value.read()) == (413, line)
    with pytest.raises(urllib.error.URLError):  # the server does not wait for the rest, and may close while we send
        client.upload("a.png", bytes(100_000_000))
    assert client.ask("Again?") == "Again what?"


@pytest.mark.parametrize("path", ["/etc/hostname", "mmft/chat/web/page.py", "../../etc/hostname"])
def test_no_file_outside_the_uploads_is_served_or_taken_for_a_picture(address: str, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        NO_PROXY.open(f"{address}/gradio_api/file={path}")
    assert refused.value.code in (403, 404)
    client = Client(address)
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.begin("What is it?", path)
    assert "not uploaded by a user" in refused.value.read().decode()
    assert Client(address).ask("Again?") == "Again what?"
