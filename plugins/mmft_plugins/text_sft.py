"""Data maps for supervised fine-tuning on text: Alpaca's columns, and OpenAI's messages."""

from collections.abc import Sequence
from functools import partial

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Conversation, Message, RawRecord, Role, Text
from mmft_plugins import _openai
from mmft_plugins._records import shown, text_field

NO_OUTPUT = "<nooutput>"  # Alpaca's own mark of a row that has no answer


def alpaca(record: RawRecord) -> Conversation | None:
    """`instruction`, `input`, `output`, with optional `system` and `history` (pairs of question and answer).

    The question is the instruction, a newline and the input; without an input it is the instruction alone (XTuner's
    `alpaca_map_fn` keeps the newline). Columns: https://github.com/tatsu-lab/stanford_alpaca; `system` and `history`
    as in LLaMA-Factory (data/README.md). None where there is no output.
    """
    instruction, given = text_field(record, "instruction"), text_field(record, "input", default="")
    system, output = text_field(record, "system", default=""), text_field(record, "output")
    if not output.strip() or output.strip() == NO_OUTPUT:
        return None
    messages = [_message("system", system)] if system else []
    for question, answer in _history(record.get("history")):
        messages += [_message("user", question), _message("assistant", answer)]
    question = f"{instruction}\n{given}" if given else instruction
    return Conversation((*messages, _message("user", question), _message("assistant", output)))


def messages(record: RawRecord) -> Conversation | None:
    """OpenAI messages without tools: roles system, user and assistant, in any order and number."""
    return _openai.conversation(record)


def _message(role: Role, text: str) -> Message:
    return Message(role, (Text(text),) if text else ())


def _history(history: object) -> list[tuple[str, str]]:
    if history is None:
        return []
    if not isinstance(history, list | tuple):
        raise DataError(f"'history' must be a list of [question, answer] pairs, found {shown(history)}")
    return [_pair(pair, number) for number, pair in enumerate(history)]


def _pair(pair: object, number: int) -> tuple[str, str]:
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        question, answer = pair
        if isinstance(question, str) and isinstance(answer, str):
            return question, answer
    raise DataError(f"history[{number}] must be a pair of strings, found {shown(pair)}")


@hookimpl
def mmft_data_maps() -> list[DataMap]:
    """Text formats."""
    openai = partial(
        DataMap,
        fn=messages,
        summary="OpenAI messages: role and content, `loss` or `weight` per message",
        columns=("messages",),
        examples=(
            {
                "messages": [
                    {"role": "system", "content": "You answer briefly."},
                    {"role": "user", "content": "Name a colour."},
                    {"role": "assistant", "content": "Red.", "weight": 0},
                    {"role": "user", "content": [{"type": "text", "text": "Another one?"}]},
                    {"role": "assistant", "content": "Blue.", "loss": True},
                ]
            },
        ),
    )
    return [
        DataMap(
            name="alpaca",
            fn=alpaca,
            summary="instruction, input, output; optional system and history",
            columns=("instruction", "input", "output"),
            examples=(
                {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"},
                {
                    "instruction": "And twice that?",
                    "input": "",
                    "output": "6",
                    "system": "You calculate.",
                    "history": [["Add 1 and 2.", "3"]],
                },
            ),
        ),
        openai(name="messages"),
        openai(name="openai"),
    ]
