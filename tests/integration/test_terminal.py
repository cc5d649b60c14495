"""`mmft chat` as a user runs it: once, through a pipe, and at a terminal."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serve_client import with_positions

# A session leader takes the first terminal it opens as the one whose Ctrl-C it gets.
AT_A_TERMINAL = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)
os.execv(sys.executable, [sys.executable, "-m", "mmft", *sys.argv[1:]])
"""
ENDLESS = "/params max_new_tokens=100000 repetition_penalty=0.01\r"  # it repeats itself and never ends
FINITE = "/params max_new_tokens=512 repetition_penalty=1\r"
PATIENCE = 1200  # seconds; a busy machine is no error
PROMPT = "\x1b[?2004h"  # prompt-toolkit is ready to read: it asks the terminal to mark what is pasted
Mmft = Callable[..., subprocess.CompletedProcess[str]]


def test_one_question_prints_the_answer_and_nothing_else(tiny_run: Path, mmft: Mmft) -> None:
    result = mmft("chat", tiny_run, "--image", tiny_run.parent / "red.png", "-m", "What is it?")
    assert (result.returncode, result.stdout) == (0, "A picture.\n"), result.stderr


def test_each_line_of_a_pipe_is_a_question_of_one_conversation(tiny_run: Path, mmft: Mmft) -> None:
    lines = [
        "What is it?",
        "/reset",
        "What is it?",
        "RESET",
        "/image nowhere.png",
        "/nonsense",
        "",
        "EXIT",
        "Say hello.",
    ]
    picture = tiny_run.parent / "red.png"
    result = mmft("chat", tiny_run, "--image", picture, input="\n".join(lines) + "\n")
    assert result.stdout == "A picture.\nA picture.\n"  # with the picture again after a reset; none after EXIT
    assert "error: nowhere.png: no such image file\n" in result.stderr
    assert "error: no command /nonsense; there are /image, /reset, " in result.stderr
    assert result.returncode == 2  # two lines had no answer


def test_a_text_model_takes_no_picture_and_the_chat_goes_on(tiny_text_run: Path, tiny_run: Path, mmft: Mmft) -> None:
    lines = [f"/image {tiny_run.parent / 'red.png'}", "Say hello.", "Again?", "RESET", "Again?"]
    result = mmft("chat", tiny_text_run, input="\n".join(lines))
    assert "this is a text model, it takes no pictures" in result.stderr
    assert result.stdout.splitlines() == ["Hello there.", "Hello again.", "Again what?"]


def test_json_counts_and_the_rest_is_on_stderr(tiny_text_run: Path, mmft: Mmft) -> None:
    result = mmft("chat", tiny_text_run, "--json", input="Say hello.\nAgain?\n")
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert (first["answer"], first["finish"], second["answer"]) == ("Hello there.", "stop", "Hello again.")
    assert second["reused_tokens"] >= first["prompt_tokens"]
    assert result.stderr == f"model: {tiny_text_run / 'final'}\n"


def test_whoever_reads_the_answers_may_stop_reading(tiny_text_run: Path, environment: dict[str, str]) -> None:
    command = f"{sys.executable} -m mmft chat {tiny_text_run} < <(yes Say hello.) | head -n 1"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, env=environment, check=False
    )
    assert (result.returncode, result.stdout) == (141, "Hello there.\n")
    assert "Traceback" not in result.stderr and "BrokenPipe" not in result.stderr


class Terminal:
    """A program at the other end of a pseudo-terminal."""

    def __init__(self, environment: dict[str, str], *arguments: str) -> None:
        self.screen = ""
        self.fd, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_A_TERMINAL, *arguments],
            stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
            env={**environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )  # fmt: skip
        os.close(inner)

    def wait_for(self, text: str) -> str:
        """What appeared up to and with a text; it is not seen again."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.screen:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not appear in {self.screen!r}"
            if select.select([self.fd], [], [], left)[0]:
                try:
                    self.screen += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError as error:  # the program has ended
                    raise AssertionError(f"{text!r} did not appear before the end of {self.screen!r}") from error
        before, _, self.screen = self.screen.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())


@pytest.fixture
def terminal(tiny_text_run: Path, environment: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    """A chat whose answers may go on for ever; the history of questions is in `state`."""
    run = with_positions(tiny_text_run)
    terminal = Terminal({**environment, "XDG_STATE_HOME": str(tmp_path / "state")}, "chat", str(run))
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.fd)


def test_a_chat_at_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("/help lists the commands.")
    terminal.wait_for(PROMPT)
    terminal.type("Say hello.\r")
    assert "<|" not in terminal.wait_for("Hello there.\r\n")  # no special token is shown
    terminal.wait_for(PROMPT)
    terminal.type("/reset\r")
    terminal.wait_for("forgotten")
    terminal.wait_for(PROMPT)
    terminal.type("/tools calculate\r")
    terminal.wait_for("on   calculate: arithmetic")
    terminal.wait_for(PROMPT)
    terminal.type("/tools -\r")
    terminal.wait_for("off  calculate: arithmetic")
    terminal.wait_for(PROMPT)
    terminal.type(ENDLESS)
    terminal.wait_for("repetition_penalty=0.01  seed")
    terminal.wait_for(PROMPT)
    terminal.type("Count.\r")
    terminal.wait_for("1111")
    terminal.type("\x03")  # Ctrl-C stops the answer and not the chat
    terminal.wait_for("(stopped)")
    terminal.wait_for(PROMPT)
    terminal.type(FINITE)
    terminal.wait_for("repetition_penalty=1.0  seed")
    terminal.wait_for(PROMPT)
    terminal.type("/reset\r")
    terminal.wait_for("forgotten")
    terminal.wait_for(PROMPT)
    terminal.type("Paint.\r")
    painted = terminal.wait_for("[31mred")
    assert "\x1b[31m" not in painted, "an escape sequence of the model reached the terminal"
    terminal.wait_for(PROMPT)
    terminal.type("RESET\r")
    terminal.wait_for("forgotten")
    terminal.wait_for(PROMPT)
    terminal.type("\x1b[A" * 10 + "\r")  # the first question is ten keys away
    terminal.wait_for("Hello there.\r\n")
    terminal.wait_for(PROMPT)
    terminal.type("\x03")  # at the prompt it ends the chat
    assert terminal.process.wait(timeout=PATIENCE) == 0
    history = tmp_path / "state" / "mmft" / "chat_history"
    assert "+Say hello." in history.read_text("utf-8")
    assert history.stat().st_mode & 0o077 == 0, "others may read what was asked"
