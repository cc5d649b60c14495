"""The page: what stands on it, and what happens when something is pressed.

Every way of asking (sending, asking again, editing) goes the same way: `begin` shows the question at once and closes
the box, `reply` waits its turn in the queue and writes, `reopen` opens the box. What a visitor has said lives in
`gr.State`, which gradio keeps apart for every open page.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from html import escape
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any

import gradio as gr
from gradio.i18n import I18nData

from mmft.chat.web.asked import Asked
from mmft.chat.web.files import Downloads
from mmft.chat.web.look import FETCH, FOCUS, LEAVE, UNFOLD
from mmft.chat.web.options import PageOptions
from mmft.chat.web.turns import Seat, Style, Turn, answered, edited, shown, turn_at
from mmft.chat.web.words import language_of, say, tables
from mmft.errors import DataError
from mmft.generation import Generation

DAY = 24 * 3600  # seconds
FRAME = 0.05  # seconds; to show every token of a fast model would cost more than to write it
SLIDERS = {  # lowest, highest, step
    "max_new_tokens": (1, 4096, 1),
    "temperature": (0, 2, 0.05),
    "top_p": (0.01, 1, 0.01),
    "top_k": (0, 200, 1),
    "repetition_penalty": (0.5, 2, 0.05),
}
WHOLE = {"max_new_tokens", "top_k", "seed"}


def build_page(seats: Sequence[Seat], options: PageOptions) -> gr.Blocks:
    """The page of one or two models, to be launched with `i18n=words()`. Text models get a box without pictures."""
    with gr.Blocks(
        analytics_enabled=False, title="mmft chat", fill_height=True, fill_width=True, delete_cache=(3600, DAY)
    ) as page:
        page.unload(Page(seats, options).left)
    page.queue(max_size=options.max_waiting, api_open=False)
    return page


def words() -> Any:
    """The table of words in gradio's form."""
    return gr.I18n(**tables())


class Edit(gr.EventData):  # type: ignore[misc]
    """An edited message: its place among those shown and its new text; -1 and None where a client sends other things.

    `gr.EditData` takes them for granted.
    """

    def __init__(self, target: Any, data: Any) -> None:
        super().__init__(target, data)
        given = data if isinstance(data, dict) else {}
        index, text = given.get("index"), given.get("value")
        place = index[0] if isinstance(index, list | tuple) and index else index
        self.place = place if isinstance(place, int) else -1
        self.text = text if isinstance(text, str) else None


class Page:
    """Its parts, made inside a `gr.Blocks`, and the functions behind them."""

    def __init__(self, seats: Sequence[Seat], options: PageOptions) -> None:
        self.seats, self.options = seats, options
        self.sees = any(seat.assistant.sees for seat in seats)
        self.one_at_a_time = Lock()  # beside the queue: a stopped answer may still be finishing its token
        self.downloads = Downloads()
        self.turns, self.asked = gr.State(()), gr.State(None)
        with gr.Row(elem_id="top"):
            gr.HTML(value=title(seats), elem_id="title")
            self.unfold, self.save, self.fresh = (
                gr.Button(self.word(key), size="sm", scale=0, min_width=60, interactive=key != "save")
                for key in ("settings", "save", "new")
            )
        with gr.Row(elem_id="chats", equal_height=True):
            self.chats = [self._chat(column, seat) for column, seat in enumerate(seats)]
        self.examples = self._examples()
        self.entry = self._box(
            elem_id="entry", show_label=False, container=False, autofocus=True,
            placeholder=self.word("ask_picture" if self.sees else "ask"),
            **({"sources": ["upload"], "file_types": ["image"], "file_count": "multiple"} if self.sees else {}),
            **({"max_plain_text_length": 10**9} if self.sees else {}),  # a long text pasted is no file
        )  # fmt: skip
        self.settings = self._settings()
        self.file = gr.DownloadButton("", elem_id="file")
        self.leave = gr.Button("", elem_id="leave")
        self._connect()

    @property
    def _box(self) -> Any:
        return gr.MultimodalTextbox if self.sees else gr.Textbox

    def _chat(self, column: int, seat: Seat) -> Any:
        """A chat area; below the model's name where two are compared."""
        with gr.Column():
            if len(self.seats) > 1:
                gr.HTML(f"<h2>{escape(seat.name)}</h2>", padding=False)
            return gr.Chatbot(
                elem_id=f"chat-{column}", elem_classes="chat", show_label=False, scale=1, buttons=[], height="100%",
                render_markdown=False, sanitize_html=True, allow_tags=False, latex_delimiters=[], editable="user",
                feedback_options=None, group_consecutive_messages=False, allow_file_downloads=False,
            )  # fmt: skip

    def _examples(self) -> Any:
        """Buttons that fill the box: questions, and the pictures of a folder. Gone once something was asked."""
        kind = "example" if self.sees else "example_text"
        with gr.Row(elem_id="examples") as row:
            self.pictures = [
                (path, gr.Button("", size="sm", icon=path, elem_classes="picture")) for path in self.options.examples
            ]
            self.questions = [(f"{kind}_{n}", gr.Button(self.word(f"{kind}_{n}"), size="sm")) for n in (1, 2, 3)]
        return row

    def _settings(self) -> list[Any]:
        """The system text and what sampling does, in a panel that folds away."""
        system, seed = self.options.system or "", self.options.generation.seed
        with gr.Sidebar(position="right", open=False, width=300, elem_id="settings"):
            gr.Markdown(self.word("settings"))
            text = gr.Textbox(system, label=self.word("system"), lines=3, max_lines=8, elem_id="system")
            sliders = [self._slider(name, *bounds) for name, bounds in SLIDERS.items()]
            given = "" if seed is None else str(seed)  # gr.Number would show nothing as 0
            return [text, *sliders, gr.Textbox(given, label=self.word("seed"), max_lines=1)]

    def _slider(self, name: str, low: float, high: float, step: float) -> Any:
        """Of a number of `Generation`, within bounds that make room for what it begins with."""
        given = getattr(self.options.generation, name)
        return gr.Slider(min(low, given), max(high, given), given, step=step, label=self.word(name))

    def _connect(self) -> None:
        """Each event and its function. `quick` ones answer at once, beside the queue."""
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        begun = [self.turns, self.asked, *self.chats, self.entry, self.fresh, self.examples]
        ways: list[tuple[Any, Any, list[Any]]] = [(self.entry.submit, self.send, [self.entry, self.turns, self.asked])]
        for column, chat in enumerate(self.chats):
            ways.append((chat.retry, self.again, [self.turns, self.asked]))
            ways.append((chat.edit, self.editor(column), [self.turns, self.asked]))
        replies = [self._answer(event(begin, given, begun, **quick), quick) for event, begin, given in ways]
        self.entry.stop(self.stop, self.asked, None, **quick).success(None, None, None, js=LEAVE)
        self.leave.click(None, None, None, cancels=replies, queue=False)
        self.fresh.click(self.reset, None, [self.turns, *self.chats, self.examples, self.save], **quick)
        saved = self.save.click(self.download, [self.turns, self.settings[0]], self.file, **quick)
        saved.success(None, self.file, None, js=FETCH)
        self.unfold.click(None, None, None, js=UNFOLD)
        for key, button in self.questions:
            button.click(self.filler(key=key), self.entry, self.entry, **quick)
        for path, button in self.pictures:
            button.click(self.filler(picture=path), self.entry, self.entry, **quick)

    def _answer(self, begun: Any, quick: dict[str, Any]) -> Any:
        """What follows a question that has begun, whichever way it was asked; all wait in one queue."""
        replied = begun.success(
            self.reply, [self.asked, self.turns, *self.settings], [self.turns, *self.chats],
            concurrency_limit=1, concurrency_id="answer", api_visibility="private",
        )  # fmt: skip
        opened = [self.turns, self.asked, *self.chats, self.entry, self.fresh, self.save]
        for event, function in ((replied.success, self.reopen), (replied.failure, self.give_up)):
            event(function, [self.asked, self.turns], opened, **quick).then(None, None, None, js=FOCUS)
        return replied

    def send(self, given: Any, turns: tuple[Turn, ...], busy: Asked | None, request: gr.Request) -> Any:
        """What is in the box: a string, or a dict with text and files."""
        given = {"text": given} if isinstance(given, str) else given or {}
        text, files = given.get("text") or "", given.get("files") or ()
        if not text.strip() and not files:
            raise nothing()
        return self.begin(Turn(text, tuple(map(str, files))), turns, busy, request)

    def again(self, turns: tuple[Turn, ...], busy: Asked | None, request: gr.Request) -> Any:
        """The last question once more."""
        if not turns:
            raise nothing()
        return self.begin(turns[-1], turns[:-1], busy, request)

    def editor(self, column: int) -> Callable[..., Any]:
        """A function for the event of an edited question: the turns after it are gone."""

        def edit(event: Edit, turns: tuple[Turn, ...], busy: Asked | None, request: gr.Request) -> Any:
            number = turn_at(turns, event.place, column)
            if number is None or event.text is None:
                raise nothing()
            turn = turns[number].unanswered(len(self.seats), text=edited(event.text))
            return self.begin(turn, turns[:number], busy, request)

        return edit

    def begin(self, turn: Turn, before: tuple[Turn, ...], busy: Asked | None, request: gr.Request) -> Any:
        """Show a question at once, before it waits its turn, and close the box."""
        language = self.language(request)
        if busy is not None:
            raise gr.Error(say(language, "busy"), print_exception=False)
        turn = turn.unanswered(len(self.seats))
        closed = self._box(value=None, interactive=False, submit_btn=False, stop_btn=True)
        chats = self.all_shown((*before, turn), language)
        return before, Asked(turn, len(before)), *chats, closed, gr.Button(interactive=False), gr.Row(visible=False)

    def reply(
        self, asked: Asked | None, turns: tuple[Turn, ...], request: gr.Request, *settings: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Every state of the answers while they grow, each a whole conversation, so that stopping keeps the last."""
        if asked is None or not asked.begin():
            yield gr.skip(), *[gr.skip()] * len(self.chats)
            return
        try:
            language = self.language(request)
            with closing(self._growing(asked, turns, settings, language)) as states:
                for turns in states:
                    yield turns, *self.all_shown(turns, language)
        finally:
            asked.end()

    def _growing(
        self, asked: Asked, turns: tuple[Turn, ...], settings: Sequence[Any], language: str
    ) -> Generator[tuple[Turn, ...], None, None]:
        """The turns, now and then while the answers of the last one grow, and at their end."""
        try:
            style = self.style(settings, language)
        except DataError as error:
            yield (*turns, asked.turn.unanswered(len(self.seats), error=str(error)))
            return
        last = 0.0
        with self.one_at_a_time, closing(answered(self.seats, style, asked.turn, turns)) as states:
            for turn in states:
                if asked.stopped:
                    break
                if monotonic() - last >= FRAME:
                    last = monotonic()
                    yield (*turns, turn)
            yield (*turns, turn)

    def stop(self, asked: Asked | None) -> None:
        """End the answer that is being written; a place in the queue is given up by what follows.

        Gradio could cancel either, but tells twice of the end of an answer that it cancels, the second time perhaps
        when the next question is on its way.
        """
        if asked is None or not asked.stop():
            raise nothing()

    def style(self, settings: Sequence[Any], language: str) -> Style:
        """What the panel says; raises `DataError` for values that no sampler takes."""
        named = zip((*SLIDERS, "seed"), settings[1:], strict=True)
        values = {name: value for name, value in named if value not in (None, "")}
        for name in values.keys() & WHOLE:
            try:
                values[name] = int(values[name])
            except (ValueError, OverflowError) as error:
                raise DataError(f"{name}={values[name]}: allowed is a whole number") from error
        generation = Generation(**{"stop": self.options.generation.stop, **values})
        return Style(settings[0] or None, generation, self.options.max_context, language)

    def reopen(self, asked: Asked | None, turns: tuple[Turn, ...], request: gr.Request) -> Any:
        """Open the box after the end of an answer."""
        return self._opened(asked, turns, request) if asked and asked.ended else self._unchanged()

    def give_up(self, asked: Asked | None, turns: tuple[Turn, ...], request: gr.Request) -> Any:
        """Open the box after a question that never began, because it was stopped or the queue was full; say so."""
        return self._unchanged() if asked is None or asked.answering else self._opened(asked, turns, request)

    def _opened(self, asked: Asked, turns: tuple[Turn, ...], request: gr.Request) -> Any:
        language = self.language(request)
        if len(turns) == asked.place:
            error = say(language, "never_began", most=self.options.max_waiting)
            turns = (*turns, asked.turn.unanswered(len(self.seats), error=error))
        opened = self._box(interactive=True, submit_btn=True, stop_btn=False)
        said = gr.Button(interactive=bool(turns))
        return turns, None, *self.all_shown(turns, language), opened, gr.Button(interactive=True), said

    def _unchanged(self) -> Any:
        return [gr.skip()] * (len(self.chats) + 5)

    def reset(self) -> Any:
        """Begin anew."""
        return (), *([] for _ in self.chats), gr.Row(visible=True), gr.Button(interactive=False)

    def download(self, turns: tuple[Turn, ...], system: str, request: gr.Request) -> Any:
        """The conversation as a file."""
        path = self.downloads.write(str(request.session_hash), turns, self.seats, system or None)
        return gr.DownloadButton(value=path)

    def left(self, request: gr.Request) -> None:
        """A page was closed."""
        self.downloads.remove(str(request.session_hash))

    def filler(self, key: str | None = None, picture: Path | None = None) -> Callable[..., Any]:
        """A function that puts an example into the box, beside what is there."""

        def fill(given: Any, request: gr.Request) -> Any:
            if key is not None and not self.sees:
                return say(self.language(request), key)
            text, files = (given or {}).get("text") or "", list((given or {}).get("files") or ())
            if picture is not None:
                return {"text": text, "files": [*files, str(picture)]}
            return {"text": say(self.language(request), str(key)), "files": files}

        return fill

    def word(self, key: str) -> Any:
        """A word on the page: in the visitor's language, which only the browser knows, or in the one that is fixed."""
        return I18nData(key) if self.options.language == "auto" else say(self.options.language, key)

    def language(self, request: Any) -> str:
        """Of a visitor."""
        return language_of(request.headers.get("accept-language"), self.options.language)

    def all_shown(self, turns: Sequence[Turn], language: str) -> list[Any]:
        """Every chat area."""
        return [shown(turns, column, language) for column in range(len(self.seats))]


def nothing() -> gr.Error:
    """To raise where there is nothing to do, so that nothing follows and nothing is shown."""
    return gr.Error("", visible=False, print_exception=False)


def title(seats: Sequence[Seat]) -> str:
    """The line at the top; two models have their names above their answers."""
    name = f"{escape(seats[0].name)} · " if len(seats) == 1 else ""
    return f"<h1>mmft chat</h1><p>{name}{seats[0].assistant.model.device}</p>"
