"""LLaVA's data formats: a conversation about images, and an image with its caption.

    {"image": "1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                         {"from": "gpt", "value": "A cat."}]}

`<image>` marks stay where they are and several are allowed, unlike LLaVA's `preprocess_multimodal` and XTuner's
`llava_map_fn`, which move one mark to the front and lose the others
(https://github.com/haotian-liu/LLaVA/blob/c121f04/llava/train/train.py). Text is kept as given; `id` is not read.
"""

from collections.abc import Mapping
from typing import Any

from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Conversation, Message, RawRecord, Role, Sample, Text
from mmft_plugins import _plain_write, _turns
from mmft_plugins._records import keys_found, object_list, one_of, text_field

ROLES: Mapping[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
SPEAKERS = {role: speaker for speaker, role in ROLES.items()}


def llava(record: RawRecord) -> Conversation | None:
    """A conversation, with images where the human's text has `<image>` marks; None where nothing is answered.

    `image` is a path, a list of paths, None or absent. Without any mark the images come first in the first question,
    a newline after each. In an answer `<image>` is text. Answers before the first question are dropped and counted.
    Raises `DataError` where marks and images differ in number.
    """
    return _turns.conversation(_turns.with_images(spoken(record), _turns.image_list(record, "image"), "human"))


def llava_image_only(record: RawRecord) -> Conversation | None:
    """A LLaVA conversation whose questions are their images alone, as XTuner's `llava_image_only_map_fn`.

    Raises `DataError` where a question shows no image.
    """
    whole = llava(record)
    if whole is None:
        return None
    for number, turn in enumerate(whole.messages):
        if turn.role == "user" and not turn.images:
            raise DataError(f"message {number + 1} (user) shows no image; the data map 'llava' reads such turns")
    messages = [Message(turn.role, turn.images) if turn.role == "user" else turn for turn in whole.messages]
    return _turns.conversation(messages, notes=whole.notes)


def spoken(record: RawRecord, roles: Mapping[str, Role] = ROLES) -> list[Message]:
    """The turns under `conversations`, each `from` a speaker and with a `value`, as plain text."""
    return [_turn(turn, number, roles) for number, turn in enumerate(object_list(record, "conversations"))]


def _turn(turn: Mapping[str, Any], number: int, roles: Mapping[str, Role]) -> Message:
    try:
        speaker = text_field(turn, "from")
        if speaker not in roles:
            raise DataError(f"from {speaker!r}; allowed: {one_of(roles)}")
        return _turns.message(roles[speaker], text_field(turn, "value"))
    except DataError as error:
        raise DataError(f"conversations[{number}]: {error}") from error


def write_llava(sample: Sample) -> RawRecord:
    """The way back: a mark where each image stands; one image as its path, several as a list."""
    turns = _plain_write.turns(sample, "llava", images=True)
    images = [str(image.source) for turn in turns for image in turn.images]
    record: dict[str, Any] = {"image": images if len(images) > 1 else images[0]} if images else {}
    said = [{"from": SPEAKERS[turn.role], "value": _plain_write.marked(turn)} for turn in turns]
    return {**record, "conversations": said}


def caption(record: RawRecord) -> Conversation | None:
    """An image and its caption, for stage 1: `caption` or `text`, or a LLaVA-Pretrain conversation less its question.

    The question goes because LLaVA trains stage 1 on image and caption alone (`preprocess_plain`).
    None where the caption is empty.
    """
    images = _turns.image_list(record, "image")
    if not images:
        raise DataError(f"'image' is missing; keys found: {keys_found(record)}")
    if "conversations" in record:
        whole = llava(record)
        kept = () if whole is None else tuple(m for m in whole.messages if m.role != "system")
        messages = tuple(Message(m.role, m.images) if m.role == "user" else m for m in kept)
        return Conversation(messages, notes=whole.notes) if whole else None
    key = next((key for key in ("caption", "text") if key in record), None)
    if key is None:
        raise DataError(f"needs 'caption', 'text' or 'conversations'; keys found: {keys_found(record)}")
    text = text_field(record, key)
    if not text.strip():
        return None
    return Conversation((Message("user", images), Message("assistant", (Text(text),))))


LLAVA_MAPS: tuple[DataMap, ...] = (
    DataMap(
        name="llava",
        fn=llava,
        summary="LLaVA conversations, with or without images",
        columns=("image", "conversations[].from", "conversations[].value"),
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
            {"image": None, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        ),
        write=write_llava,
    ),
    DataMap(
        name="llava_image_only",
        fn=llava_image_only,
        summary="LLaVA conversations whose questions are reduced to their images",
        columns=("image", "conversations[].from", "conversations[].value"),
        examples=(
            {
                "image": "1.jpg",
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe it."},
                    {"from": "gpt", "value": "A cat on a mat."},
                ],
            },
            {
                "image": "2.jpg",
                "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A dog."}],
            },
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
