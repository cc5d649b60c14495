"""What the tests of chat templates share: short conversations, and what a template makes of them as text."""

from itertools import groupby
from typing import Any

from mmft.types import Conversation, Image, Message, Role, Segment, Text

TALK: tuple[tuple[Role, str], ...] = (("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao"))


def talk(*turns: tuple[Role, str], **options: Any) -> Conversation:
    """A conversation of (role, text) turns."""
    return Conversation(tuple(Message(role, (Text(text),)) for role, text in turns), **options)


def shown(segments: Any) -> str:
    """The text, `[...]` around what is trained and `{source}` for an image."""
    text = ""
    for loss, run in groupby(segments, key=lambda segment: segment.loss):
        inner = "".join(f"{{{s.content.source}}}" if isinstance(s.content, Image) else s.content for s in run)
        text += f"[{inner}]" if loss else inner
    return text


def data(segments: list[Segment]) -> list[Any]:
    """What is not markup."""
    return [segment.content for segment in segments if not segment.markup]
