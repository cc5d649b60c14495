"""Keys at the prompt, as a terminal sends them."""

import sys
import time
from pathlib import Path
from select import select
from threading import Event, Thread
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.application.current import AppSession
from prompt_toolkit.input import PipeInput, create_pipe_input

from mmft.chat.keyboard import Keyboard

UP, ALT_ENTER, CTRL_C, CTRL_D = "\x1b[A", "\x1b\r", "\x03", "\x04"


@pytest.fixture(autouse=True)
def at_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")


def typed(*keys: str, multiline: bool = False) -> list[str]:
    """The questions that some keys make. Between two groups a person waits: history and completions load meanwhile."""

    ended = Event()

    def press() -> None:
        for group in (*keys, CTRL_D):
            wait_for_prompt(app_session, pipe, ended)
            pipe.send_text(group)

    with create_pipe_input() as pipe, create_app_session(input=pipe) as app_session:
        keyboard = Keyboard(["/image", "/reset", "EXIT"], lambda command: command == "/image", multiline=multiline)
        hands = Thread(target=press)
        hands.start()
        try:
            return list(keyboard.questions(lambda text: None))
        finally:
            ended.set()
            hands.join()


def wait_for_prompt(app_session: AppSession, pipe: PipeInput, ended: Event) -> None:
    """Until the keys sent so far are read, and the prompt that stands there then has its history."""

    def state() -> tuple[Any, ...] | None:
        app = app_session.app
        unread = bool(select([pipe.fileno()], [], [], 0)[0])
        if app is None or not app.is_running or unread or app.key_processor.input_queue:
            return None
        history, completion = app.current_buffer._load_history_task, app.current_buffer.complete_state
        if history is None or not history.done():
            return None
        return id(history), app.current_buffer.text, completion is not None

    steady, seen = 0, state()
    while steady < 4 and not ended.is_set():
        time.sleep(0.05)
        now = state()
        steady, seen = (steady + 1 if now is not None and now == seen else 0), now


def test_enter_sends_and_alt_enter_makes_a_new_line() -> None:
    assert typed(f"one\rtwo{ALT_ENTER}three\r") == ["one", "two\nthree"]


@pytest.mark.parametrize("multiline", [False, True])
def test_pasted_lines_stay_in_one_question(multiline: bool) -> None:
    paste = "\x1b[200~one\ntwo\x1b[201~"
    assert typed(paste + ("\r\r" if multiline else "\r"), multiline=multiline) == ["one\ntwo"]


def test_in_multiline_mode_a_question_ends_with_an_empty_line() -> None:
    assert typed("one\rtwo\r\rthree\r\r", multiline=True) == ["one\ntwo", "three"]


def test_in_multiline_mode_a_command_needs_no_empty_line() -> None:
    assert typed("/reset\rEXIT\r/image a b.png\rone\r\r", multiline=True) == ["/reset", "EXIT", "/image a b.png", "one"]


@pytest.mark.parametrize("end", [CTRL_C, CTRL_D])
def test_ctrl_c_and_ctrl_d_end_the_questions(end: str) -> None:
    assert typed(f"one\r{end}two\r") == ["one"]


def test_earlier_questions_are_a_key_away_in_the_next_chat_too(tmp_path: Path) -> None:
    assert typed("one\r", "two\r", f"{UP}{UP}\r") == ["one", "two", "one"]
    assert typed("", f"{UP}{UP}\r") == ["two"]
    assert (tmp_path / "state" / "mmft" / "chat_history").stat().st_mode & 0o077 == 0


def test_without_a_place_for_a_file_the_history_is_of_this_chat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert typed("one\r", f"{UP}\r") == ["one", "one"]


def test_tab_completes_commands_and_the_paths_after_them(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("")
    assert typed("/ima\t", "\r") == ["/image"]
    assert typed(f"/image {tmp_path}/pic\t", "\r") == [f"/image {tmp_path}/picture.png"]
