"""A chat page with pictures, on this machine: Gradio over `ChatSession`.

What a visitor has said lives in `gr.State`, which Gradio keeps apart for every open page; the chat area only shows it
and is never read back. Each question makes a `ChatSession` from it, and the model answers one question at a time.
"""

import logging
import os
import signal
import socket
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from html import escape
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from mmft.chat.session import ChatSession, answer
from mmft.errors import MmftError
from mmft.inference import Assistant, Generation, user_message
from mmft.memory import Memory
from mmft.types import Message

if TYPE_CHECKING:
    import gradio

log = logging.getLogger("mmft")
MAX_UPLOAD = "20mb"  # each picture
MAX_WAITING = 16  # questions in the queue; the page says so to those beyond
DAY = 24 * 3600  # seconds
# Text is shown as it is, so its line breaks and spaces are kept. Hidden: Gradio's own "Clear", which empties the screen
# and not the conversation, and "Share", which would upload a picture.
CSS = """
.gradio-container { width: 100%; max-width: 900px !important; margin: 0 auto !important; }
#top { align-items: center; flex-wrap: nowrap; }
#title h1 { font-size: 1.15rem; margin: 0; }
#title p { color: var(--body-text-color-subdued); margin: 0; }
#chat .message, #chat .message-markdown-disabled { white-space: normal; }
#chat .message-content .md { white-space: pre-wrap; overflow-wrap: anywhere; }
#chat .image-frame img { max-height: 320px; width: auto; }
#chat button[aria-label="Clear"], #chat button[aria-label="Share"] { display: none; }
"""
# The box is closed while an answer is written; then the cursor goes back, except where that opens a phone's keyboard.
FOCUS = "() => matchMedia('(hover: hover)').matches && document.querySelector('#entry textarea').focus()"


@dataclass(frozen=True)
class Turn:
    """A question and what came of it: an answer, perhaps stopped early, or an error; before it begins, neither.

    `notice` is what the visitor should know of it: that the oldest turns no longer fit.
    """

    text: str
    images: tuple[str, ...] = ()
    answer: str | None = None
    error: str | None = None
    notice: str | None = None


def serve(assistant: Assistant, *, host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> None:
    """Serve the page until Ctrl-C. Uploads live in a folder of this server and are deleted with it.

    Raises `MmftError` where the address cannot be used or gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise MmftError('the page needs gradio; run: pip install "mmft[web]"')
    _check_address(host, port)
    if host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("%s: everybody who reaches this machine can use the page; there is no password", host)
    with tempfile.TemporaryDirectory(prefix="mmft-web-") as uploads:
        _prepare_process(uploads, host)
        import gradio as gr

        page = build_page(assistant, Generation())
        try:
            _, local, public = page.launch(
                server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True,
                max_file_size=MAX_UPLOAD, ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False,
                footer_links=[], css=CSS, theme=gr.themes.Default(font=["system-ui", "sans-serif"]),
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise MmftError(f"cannot serve on {host}:{port}: {error}") from error
        if share and not public:
            log.warning("no public address: gradio could not reach its relay; the page is open on this machine only")
        print(f"open {public or local} (Ctrl-C ends)", flush=True)  # noqa: T201
        page.block_thread()


def _prepare_process(uploads: str, host: str) -> None:
    """What gradio takes from the environment alone, when imported; and a SIGTERM that ends as cleanly as Ctrl-C."""
    os.environ["GRADIO_TEMP_DIR"] = uploads  # else /tmp/gradio, which belongs to the first user of a machine
    local = ",".join(filter(None, (os.environ.get("no_proxy"), "localhost", "127.0.0.1", host)))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = local  # gradio calls its own server once, through a proxy if set
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _check_address(host: str, port: int) -> None:
    """Gradio's own message speaks of a range of ports, whatever the cause."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number and number > 0 else str(error)
        raise MmftError(f"cannot serve on {host}:{port}: {reason}; give another --port or --host") from error


def build_page(assistant: Assistant, generation: Generation) -> "gradio.Blocks":
    """The page, to be launched. Text models get a box without pictures."""
    import gradio as gr

    box: Any = gr.MultimodalTextbox if assistant.sees else gr.Textbox
    pictures = {"sources": ["upload"], "file_types": ["image"], "file_count": "multiple"} if assistant.sees else {}
    hint = "Ask something, with pictures if you like" if assistant.sees else "Ask something"
    one_at_a_time = Lock()  # beside the queue: a stopped answer may still be finishing its token
    memory = Memory()  # of whoever asked last

    def accept(given: Any, turns: tuple[Turn, ...]) -> tuple[Any, ...]:
        """Show the question at once, before it waits its turn, and close the box."""
        asked = _asked(given)
        if asked is None:
            return None, gr.skip(), gr.skip(), gr.skip()
        closed = box(value=None, interactive=False, submit_btn=False, stop_btn=True)
        return asked, shown((*turns, asked)), closed, gr.Button(interactive=False)

    def reply(asked: Turn | None, turns: tuple[Turn, ...]) -> Iterator[tuple[Any, ...]]:
        """Every state of the answer while it grows, each a whole conversation, so that stopping keeps the last."""
        if asked is None:
            yield gr.skip(), gr.skip()
            return
        with one_at_a_time, closing(answered(assistant, generation, asked, turns, memory)) as states:
            for turn in states:
                yield (*turns, turn), shown((*turns, turn))

    def reopen() -> tuple[Any, ...]:
        return box(interactive=True, submit_btn=True, stop_btn=False), gr.Button(interactive=True)

    with gr.Blocks(
        analytics_enabled=False, title="mmft chat", fill_height=True, fill_width=True, delete_cache=(3600, DAY)
    ) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(value=_title(assistant), elem_id="title")
            fresh = gr.Button("New chat", size="sm", scale=0, min_width=100)
        chat = gr.Chatbot(
            elem_id="chat", show_label=False, scale=1, buttons=[], render_markdown=False, sanitize_html=True,
            allow_tags=False, latex_delimiters=[], feedback_options=None,
        )  # fmt: skip
        entry = box(elem_id="entry", show_label=False, container=False, placeholder=hint, autofocus=True, **pictures)
        turns, asked = gr.State(()), gr.State(None)
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        accepted = entry.submit(accept, [entry, turns], [asked, chat, entry, fresh], **quick)
        replied = accepted.then(reply, [asked, turns], [turns, chat], concurrency_limit=1, api_visibility="private")
        replied.then(reopen, None, [entry, fresh], **quick).then(None, None, None, js=FOCUS)
        entry.stop(None, None, None, cancels=[replied], queue=False)
        fresh.click(lambda: ((), []), None, [turns, chat], **quick)
    page.queue(max_size=MAX_WAITING, api_open=False)
    return page


def answered(
    assistant: Assistant,
    generation: Generation,
    asked: Turn,
    turns: Sequence[Turn],
    memory: Memory | None = None,
) -> Generator[Turn, None, None]:
    """The turn while its answer grows; one that ends in an error says it and leaves nothing to the turns after it."""
    notices: list[str] = []
    session = ChatSession(assistant, generation, history=history(turns), memory=memory, notify=notices.append)
    text = ""
    yield asked
    try:
        with closing(session.ask(asked.text, asked.images)) as pieces:
            asked = replace(asked, notice="; ".join(notices) or None)
            for piece in pieces:
                text += piece
                yield replace(asked, answer=text)
        yield replace(asked, answer=text)
    except MmftError as error:
        folders = {f"{Path(image).parent}/" for image in asked.images}  # of the server, and of no use to a visitor
        yield replace(asked, error=reduce(lambda text, folder: text.replace(folder, ""), folders, str(error)))
    except Exception as error:  # a bug of ours or a full GPU: the log has the traceback, the page stays usable
        log.exception("the question %r failed", asked.text)
        yield replace(asked, error=f"{type(error).__name__}; see the terminal of mmft web")


def history(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """What the model is told of earlier turns: those that were answered."""
    done = [(turn, turn.answer) for turn in turns if turn.answer is not None]
    return tuple(message for turn, text in done for message in (user_message(turn.text, turn.images), answer(text)))


def shown(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The turns as Gradio's chat messages. A picture that could not be read is shown by its name."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        pictures = [_text(Path(image).name) if turn.error else {"path": image} for image in turn.images]
        messages.append({"role": "user", "content": [*pictures, *([_text(turn.text)] if turn.text else [])]})
        if turn.error is not None:
            messages.append({"role": "assistant", "content": [_text(f"⚠ not answered: {turn.error}")]})
        elif turn.answer is not None:
            notice = [_text(f"({turn.notice})")] if turn.notice else []
            messages.append({"role": "assistant", "content": [*notice, _text(turn.answer)]})
    return messages


def _text(text: str) -> dict[str, str]:
    """Escaped, because gradio 6.31 puts a message into the page as HTML even with `render_markdown=False`.

    A plain string instead of this dict would lose its indentation to `inspect.cleandoc`.
    """
    return {"type": "text", "text": escape(text, quote=False)}


def _asked(given: Any) -> Turn | None:
    """The turn of what is in the box: a string, or a dict with text and files. None where it is empty."""
    text, files = (given, ()) if isinstance(given, str) else (given.get("text") or "", given.get("files") or ())
    return Turn(text, tuple(map(str, files))) if text.strip() or files else None


def _title(assistant: Assistant) -> str:
    name = str(getattr(assistant.model.causal_lm.config, "name_or_path", "") or "language model")
    name = Path(name).name if Path(name).is_absolute() else name
    kind = "sees pictures" if assistant.sees else "text only"
    return f"<h1>mmft chat</h1><p>{escape(name)} · {kind} · on {assistant.model.device}</p>"
