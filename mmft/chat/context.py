"""What of a conversation fits into the model's context: the system text and the newest turns, each whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmft.errors import DataError
from mmft.inference import Assistant
from mmft.types import Conversation, Message

# Once turns must go, so many go that a quarter of the room is free: else the beginning of the prompt would change with
# every question from then on, and nothing that was computed could be used again.
KEPT = 0.75


@dataclass(frozen=True)
class Fit:
    """The turns that are kept, how many were dropped, and how many tokens the answer may have."""

    turns: tuple[Message, ...]
    dropped: int
    max_new_tokens: int


def fitted(
    assistant: Assistant,
    system: Sequence[Message],
    turns: Sequence[Message],
    asked: Message,
    max_new_tokens: int,
    max_context: int | None,
    *,
    after: Sequence[Message] = (),
    tools: Sequence[Mapping[str, Any]] = (),
) -> Fit:
    """Drop the oldest turns until the prompt leaves room for an answer (of a quarter of the context, if it is long).

    `after` is what has followed the question: calls of `tools` and their results, which stay with it.
    Raises `DataError` where the question alone does not fit.
    """
    if max_context is None:
        return Fit(tuple(turns), 0, max_new_tokens)
    room = max_context - min(max_new_tokens, max_context // 4)
    groups, dropped = grouped(turns), 0
    now = (asked, *after)
    length = _length(assistant, (*system, *turns, *now), tools)
    if length > room:
        while groups[dropped:] and length > KEPT * room:
            dropped += 1
            kept = tuple(message for group in groups[dropped:] for message in group)
            length = _length(assistant, (*system, *kept, *now), tools)
    if length >= max_context:
        tools_too = ", its tools and their results" if tools else ""
        raise DataError(
            f"the question takes {length:,} tokens with its pictures{tools_too} and the system text, the context has "
            f"{max_context:,}; make it shorter"
        )
    kept = tuple(message for group in groups[dropped:] for message in group)
    return Fit(kept, dropped, min(max_new_tokens, max_context - length))


def grouped(turns: Sequence[Message]) -> list[list[Message]]:
    """Turns as a person counts them: a question with everything up to the next."""
    groups: list[list[Message]] = []
    for message in turns:
        if message.role == "user" or not groups:
            groups.append([])
        groups[-1].append(message)
    return groups


def _length(assistant: Assistant, messages: tuple[Message, ...], tools: Sequence[Mapping[str, Any]]) -> int:
    return len(assistant.prompt(Conversation(messages, tuple(tools))))
