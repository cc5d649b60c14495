"""What the simple formats need on the way back: plain turns, or the reason why a sample has no place in the format."""

from mmft.errors import DataError
from mmft.types import Conversation, Image, Message, Sample
from mmft_plugins._turns import MARK


def turns(sample: Sample, name: str, *, images: bool = False, tools: bool = False) -> list[Message]:
    """The messages of a sample for a format that has a place for images or tools, or has not.

    Raises `DataError` for what the format `name` cannot hold: a document, tools, pictures, a changed loss.
    """
    if not isinstance(sample, Conversation):
        raise DataError(f"{name!r} has no place for a document; use 'pretrain'")
    for number, message in enumerate(sample.messages):
        where = f"message {number + 1} ({message.role})"
        if not tools and (message.role == "tool" or message.tool_calls):
            raise DataError(f"{where}: {name!r} has no place for tools; use 'messages' or 'sharegpt'")
        if message.images and (not images or message.role != "user"):
            raise DataError(f"{where}: {name!r} has no place for an image there; use 'messages'")
        if message.is_trained != (message.role == "assistant"):
            raise DataError(f"{where}: {name!r} has no place for its own 'loss'; use 'messages'")
        if images and message.role == "user" and sample.images and MARK in message.text:
            raise DataError(f"{where}: its text spells {MARK}, which {name!r} reads as an image; use 'messages'")
    if sample.tools and not tools:
        raise DataError(f"{name!r} has no place for tools; use 'messages' or 'sharegpt'")
    return list(sample.messages)


def marked(message: Message) -> str:
    """The text of a message with a mark for each image."""
    return "".join(MARK if isinstance(part, Image) else part.text for part in message.parts)


def split_pairs(messages: list[Message], name: str) -> tuple[str, list[tuple[Message, Message]]]:
    """(system text, pairs of question and answer). Raises `DataError` where the roles do not take turns."""
    system = ""
    if messages and messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
    roles = [message.role for message in messages]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"{name!r} holds one system text, then question and answer in turn; found {', '.join(roles) or 'no turn'}"
        )
    return system, list(zip(messages[::2], messages[1::2], strict=True))
