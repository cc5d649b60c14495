"""LLaVA's data formats: a conversation about images, and an image with its caption.

    {"image": "1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}]}

`<image>` marks stay where they are and several are allowed, unlike LLaVA's `preprocess_multimodal` and XTuner's
`llava_map_fn`, which move one mark to the front and lose the others
(https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/train/train.py). Text is kept exactly as given.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Conversation, Image, Message, RawRecord, Role, Text
from mmft_plugins._openai import drop_leading_answers, has_answer
from mmft_plugins._records import keys_found, object_list, one_of, shown, text_field

MARK = "<image>"
ROLES: Mapping[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


def llava(record: RawRecord) -> Conversation | None:
    """A conversation, with images where the human's text has `<image>` marks; None where nothing is answered.

    `image` is a path, a list of paths, None or absent. Without any mark the images come first in the first question,
    a newline after each. In an answer `<image>` is text. Answers before the first question are dropped.
    Raises `DataError` where marks and images differ in number.
    """
    images = _images(record)
    turns = [_turn(turn, number) for number, turn in enumerate(object_list(record, "conversations"))]
    marks = sum(text.count(MARK) for role, text in turns if role == "user")
    if images and not marks:
        turns, marks = _marked(turns, len(images)), len(images)
    if marks != len(images):
        raise DataError(f"{_count(marks, f'{MARK} mark')}, {_count(len(images), 'image')}; the numbers must be equal")
    waiting = iter(images)
    messages = [Message(role, _parts(role, text, waiting)) for role, text in turns]
    kept = drop_leading_answers(messages)
    return Conversation(kept) if has_answer(kept) else None


def caption(record: RawRecord) -> Conversation | None:
    """An image and its caption, for stage 1: `caption` or `text`, or a LLaVA-Pretrain conversation less its question.

    The question goes because LLaVA trains stage 1 on image and caption alone (`preprocess_plain`).
    None where the caption is empty.
    """
    images = _images(record)
    if not images:
        raise DataError(f"'image' is missing; keys found: {keys_found(record)}")
    if "conversations" in record:
        whole = llava(record)
        kept = () if whole is None else tuple(m for m in whole.messages if m.role != "system")
        messages = tuple(Message(m.role, m.images) if m.role == "user" else m for m in kept)
        return Conversation(messages) if messages else None
    key = next((key for key in ("caption", "text") if key in record), None)
    if key is None:
        raise DataError(f"needs 'caption', 'text' or 'conversations'; keys found: {keys_found(record)}")
    text = text_field(record, key)
    if not text.strip():
        return None
    return Conversation((Message("user", images), Message("assistant", (Text(text),))))


def _images(record: RawRecord) -> tuple[Image, ...]:
    value = record.get("image")
    if value is None:
        return ()
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) and path for path in paths):
        raise DataError(f"'image' must be a path, a list of paths or null, found {shown(value)}")
    return tuple(Image(path) for path in paths)


def _turn(turn: Mapping[str, Any], number: int) -> tuple[Role, str]:
    try:
        speaker = text_field(turn, "from")
        if speaker not in ROLES:
            raise DataError(f"from {speaker!r}; allowed: {one_of(ROLES)}")
        return ROLES[speaker], text_field(turn, "value")
    except DataError as error:
        raise DataError(f"conversations[{number}]: {error}") from error


def _marked(turns: list[tuple[Role, str]], count: int) -> list[tuple[Role, str]]:
    """The turns with `count` marks put before the first question."""
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if first is None:
        raise DataError(f"{_count(count, 'image')}, but no turn from 'human' to show it in")
    return [
        (role, f"{MARK}\n" * count + text if number == first else text) for number, (role, text) in enumerate(turns)
    ]


def _parts(role: Role, text: str, images: Iterator[Image]) -> tuple[Text | Image, ...]:
    if role != "user":
        return (Text(text),) if text else ()
    parts: list[Text | Image] = []
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append(next(images))
        if piece:
            parts.append(Text(piece))
    return tuple(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


LLAVA_MAPS: tuple[DataMap, ...] = (
    DataMap(
        name="llava",
        fn=llava,
        summary="LLaVA conversations, with or without images",
        columns=("image", "conversations"),
        examples=(
            {
                "id": "1",
                "image": "coco/1.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "A cat."},
                    {"from": "human", "value": "What colour?"},
                    {"from": "gpt", "value": "Grey."},
                ],
            },
            {
                "image": ["a.jpg", "b.jpg"],
                "conversations": [
                    {"from": "human", "value": "Compare <image> with <image>."},
                    {"from": "gpt", "value": "The first is larger."},
                ],
            },
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        ),
    ),
    DataMap(
        name="caption",
        fn=caption,
        summary="an image and its caption, or LLaVA-Pretrain conversations",
        columns=("image", "caption"),
        examples=(
            {"image": "1.jpg", "caption": "a cat on a mat"},
            {
                "image": "2.jpg",
                "conversations": [
                    {"from": "human", "value": "Describe it briefly.\n<image>"},
                    {"from": "gpt", "value": "a dog in the snow"},
                ],
            },
        ),
    ),
)
