"""An answer in OpenAI's form: as one JSON object, or in chunks as server-sent events.

Format: https://platform.openai.com/docs/api-reference/chat/object, and .../chat-streaming beside it.
"""

import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from mmft.chat.server.desk import End, Job
from mmft.chat.server.errors import Refused
from mmft.memory import Usage
from mmft.types import ToolCall


@dataclass(frozen=True)
class Answer:
    """Writes the answer to one question by the model `name`."""

    name: str
    job: Job
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The object `chat.completion`. Raises `Refused` where there is no answer."""
        pieces: list[str] = []
        while not isinstance(event := await self.job.next(), End):
            pieces.append(event)
        message: dict[str, Any] = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        if event.calls:
            message |= {"content": message["content"] or None, "tool_calls": _calls(event.calls)}
        choice = {"index": 0, "message": message, "finish_reason": event.reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": _usage(event.usage)}

    async def stream(self, first: str | End) -> AsyncGenerator[str, None]:
        """The events of `chat.completion.chunk`, of which the first piece is known, so that errors came before."""
        yield self._chunk({"role": "assistant", "content": ""})
        event = first
        try:
            while not isinstance(event, End):
                yield self._chunk({"content": event})
                event = await self.job.next()
        except Refused as refused:
            yield _event(refused.body)
            return
        if event.calls:
            calls = [{"index": number, **call} for number, call in enumerate(_calls(event.calls))]
            yield self._chunk({"tool_calls": calls})
        yield self._chunk({}, event.reason)
        if self.job.ask.include_usage:
            yield _event({**self._head("chat.completion.chunk"), "choices": [], "usage": _usage(event.usage)})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        usage = {"usage": None} if self.job.ask.include_usage else {}
        return _event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _calls(calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    """With an id of their own, where the format has none: a result refers to it."""
    return [
        {
            "id": call.id or f"call_{uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)},
        }
        for call in calls
    ]


def _usage(usage: Usage) -> dict[str, Any]:
    """The numbers of tokens. Of the prompt before, `cached_tokens` tells only whoever asked that too (`Desk`).

    How long an answer takes still hints at it: all who have the server's key (`--api-key`) are one group of users.
    """
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.answer_tokens,
        "total_tokens": usage.prompt_tokens + usage.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
    }
