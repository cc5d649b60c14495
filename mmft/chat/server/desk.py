"""One model, one answer at a time: a bounded queue of questions, answered by one thread.

Whoever asks reads the pieces of the answer in the event loop. When they leave, the model stops at its next token.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread

from mmft.chat.server.errors import Refused
from mmft.chat.server.pictures import Pictures
from mmft.chat.server.request import Ask
from mmft.chat.tools import CallReader
from mmft.errors import MmftError
from mmft.inference import Assistant, Generation
from mmft.memory import Memory, Usage
from mmft.types import Conversation, Message, Text, ToolCall

log = logging.getLogger("mmft")
MAX_ROUNDS = 2  # of an answer; more would only say again that nothing is called


@dataclass(frozen=True)
class End:
    """The last of an answer: its numbers of tokens, why it ended, and the calls it makes."""

    usage: Usage
    calls: tuple[ToolCall, ...] = ()

    @property
    def reason(self) -> str:
        """As OpenAI calls it."""
        return "tool_calls" if self.calls else "length" if self.usage.finish == "length" else "stop"


@dataclass
class Job:
    """A question in the queue. Made in the event loop; `tell` is called by the thread that answers."""

    ask: Ask
    gone: Event = field(default_factory=Event)
    _events: "asyncio.Queue[str | End | Refused]" = field(default_factory=asyncio.Queue)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    async def next(self) -> str | End:
        """A piece of the answer, or its end. Raises `Refused` where there is no answer."""
        event = await self._events.get()
        if isinstance(event, Refused):
            raise event
        return event

    def tell(self, event: str | End | Refused) -> None:
        """Hand something over to whoever asked."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def leave(self) -> None:
        """Nobody waits for this answer any more."""
        self.gone.set()
        self._events.put_nowait(_left())


class Desk:
    """The model and those who wait for it. `max_waiting` are the questions beside the one that is being answered."""

    def __init__(
        self, assistant: Assistant, pictures: Pictures, *, max_waiting: int, max_context: int | None = None
    ) -> None:
        self.memory = Memory()
        self.in_progress = self.answered = self.cancelled = 0
        self._assistant, self._pictures, self._max_waiting = assistant, pictures, max_waiting
        self._max_context = min((n for n in (max_context, assistant.max_context) if n), default=None)
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._closing = Event()
        self._current: Job | None = None
        self._run: Conversation | None = None  # whose prompt `memory` holds
        self._thread = Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and answer."""
        return self._max_context

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place, from before a request is read to the end of its answer. Raises `Refused` where there is none."""
        if self._closing.is_set():
            raise self._ending()
        if self.in_progress > self._max_waiting:
            full = f"{self._max_waiting} questions are waiting already (--max-waiting); ask again later"
            raise Refused(full, status=503, code="queue_full")
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1

    def put(self, job: Job) -> None:
        """Queue a question, whose pictures are released once another was answered."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Refuse whoever waits, and end the answer that is being written. Callable from a signal handler."""
        self._closing.set()
        if job := self._current:
            job.gone.set()

    def close(self) -> None:
        """Stop, and wait for the model."""
        self.stop()
        self._jobs.put(None)
        self._thread.join(timeout=30)

    def _work(self) -> None:
        held: list[Path] = []  # the pictures of the last prompt, which `memory` knows by their files
        while (job := self._jobs.get()) is not None:
            if job.gone.is_set():
                self.cancelled += 1
                job.tell(_left())
                self._pictures.release(job.ask.held)
                continue
            self._current = job
            try:
                self._answer(job)
            except Refused as refused:
                job.tell(refused)
            except MmftError as error:
                told = reduce(lambda text, of: text.replace(str(of[0]), of[1]), job.ask.places.items(), str(error))
                job.tell(Refused(told))
            except Exception as error:  # a bug of ours or a full GPU: the log has the traceback, the server goes on
                log.exception("a question failed")
                self.memory.forget()
                job.tell(Refused(f"{type(error).__name__}; see the log of mmft serve", status=500))
            self._pictures.release(held)
            held = job.ask.held

    def _answer(self, job: Job) -> None:
        conversation, calls = job.ask.conversation, tuple[ToolCall, ...]()
        for _ in range(MAX_ROUNDS):
            own = self._run is not None and _goes_on(conversation, self._run)
            said = self._round(job, conversation)
            if said is None:
                self.cancelled += 1
                job.tell(_left())
                return
            calls = tuple(call for call in said.tool_calls if call.name)
            if calls or not said.tool_calls:
                break
            # A form in which the model must be told that it called nothing, before it answers.
            told = [Message("tool", (Text("None"),), call_id=call.id) for call in said.tool_calls]
            conversation = replace(conversation, messages=(*conversation.messages, said, *told))
        assert self.memory.usage is not None
        self.answered += 1
        job.tell(End(self.memory.usage if own else replace(self.memory.usage, reused_tokens=0), calls))

    def _round(self, job: Job, conversation: Conversation) -> Message | None:
        """What the model writes, told piece by piece but for its calls; None where nobody waits for it any more."""
        if self._closing.is_set():
            raise self._ending()
        reader = CallReader(self._assistant.template) if conversation.tools else None
        generation = self._fitted(conversation, job.ask.generation)
        self._run = conversation
        stream = self._assistant.stream(
            conversation, generation, self.memory, marks=reader is not None, cancel=job.gone
        )
        with closing(stream) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                if job.gone.is_set():
                    break
                if shown := reader.take(piece) if reader else piece:
                    job.tell(shown)
        if self._closing.is_set():
            raise self._ending()
        if job.gone.is_set():
            return None
        rest, said, calls = reader.end() if reader else ("", "", ())
        if rest:
            job.tell(rest)
        return Message("assistant", (Text(said),) if said else (), calls)

    def _fitted(self, conversation: Conversation, generation: Generation) -> Generation:
        """With as many new tokens as the context has room for. Raises `Refused` where it has none.

        Nothing is dropped, as in a chat: the history is the caller's, who would not know of it.
        """
        if self._max_context is None:
            return generation
        length = len(self._assistant.prompt(conversation))
        if length >= self._max_context:
            raise Refused(
                f"messages: they take {length:,} tokens with their pictures, the context has {self._max_context:,}; "
                "send fewer or shorter ones",
                param="messages", code="context_length_exceeded",
            )  # fmt: skip
        return replace(generation, max_new_tokens=min(generation.max_new_tokens, self._max_context - length))

    def _ending(self) -> Refused:
        return Refused("the server is ending", status=503, code="server_ending")


def _left() -> Refused:
    return Refused("the client left", status=499)


def _goes_on(conversation: Conversation, earlier: Conversation) -> bool:
    """Whether whoever asks this has sent all of an earlier request, so that its tokens are told to nobody else.

    One memory serves everybody. How many tokens of the prompt before were used again would otherwise let a client
    guess, token by token, what another has asked.
    """
    length = len(earlier.messages)
    begins = conversation.messages[:length] == earlier.messages and len(conversation.messages) > length
    return begins and conversation.tools == earlier.tools
