"""A plugin for mmft in one module: the `zephyr` chat template and the `question_answer` data map.

Nothing here imports torch, and everything is a module-level function, so the specs pickle.
"""

from mmft import (
    ChatTemplate,
    Conversation,
    DataError,
    DataMap,
    Image,
    Message,
    RawRecord,
    Segment,
    Text,
    hookimpl,
)

END = "</s>"


def render_zephyr(conversation: Conversation, /, *, generation_prompt: bool = False) -> list[Segment]:
    """`<|role|>`, a line break, the text, `</s>`, a line break. The answer is trained with its `</s>`."""
    if conversation.tools:
        raise DataError("chat template 'zephyr' has no form for tools")
    segments: list[Segment] = []
    for message in conversation.messages:
        segments.append(Segment(f"<|{message.role}|>\n", markup=True))
        for part in message.parts:
            content = part if isinstance(part, Image) else part.text
            segments.append(Segment(content, loss=message.is_trained))
        segments.append(Segment(END, loss=message.is_trained, markup=True))
        segments.append(Segment("\n", markup=True))
    if generation_prompt:
        segments.append(Segment("<|assistant|>\n", markup=True))
    return segments


def question_answer(record: RawRecord) -> Conversation | None:
    """`question`, `answer` and an optional `image`; None where the answer is empty. The record is not modified."""
    for key in ("question", "answer"):
        if not isinstance(record.get(key), str):
            raise DataError(f"{key!r} must be a string; keys found: {', '.join(map(str, record))}")
    if not record["answer"].strip():
        return None
    image = (Image(record["image"]), Text("\n")) if record.get("image") else ()
    return Conversation(
        (
            Message("user", (*image, Text(record["question"]))),
            Message("assistant", (Text(record["answer"]),)),
        )
    )


@hookimpl
def mmft_chat_templates() -> list[ChatTemplate]:
    """One chat format."""
    source = "https://huggingface.co/HuggingFaceH4/zephyr-7b-beta"
    return [ChatTemplate(name="zephyr", render=render_zephyr, stop=(END,), source=source)]


@hookimpl
def mmft_data_maps() -> list[DataMap]:
    """One data format."""
    return [
        DataMap(
            name="question_answer",
            fn=question_answer,
            summary="question, answer, optional image",
            columns=("question", "answer"),
            examples=(
                {"question": "Name a colour.", "answer": "Red."},
                {"question": "What is it?", "answer": "A cat.", "image": "1.jpg"},
            ),
        )
    ]
