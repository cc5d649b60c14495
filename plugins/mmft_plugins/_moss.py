r"""moss-003-sft: turns in which the assistant thinks, commands tools, gets their results and answers.

    {"meta_instruction": "...", "num_turns": 1, "chat": {"turn_1": {
        "Human": "<|Human|>: ...<eoh>\n", "Inner Thoughts": "<|Inner Thoughts|>: ...<eot>\n",
        "Commands": "<|Commands|>: Search(\"...\")<eoc>\n", "Tool Responses": "<|Results|>: ...<eor>\n",
        "MOSS": "<|MOSS|>: ...<eom>\n"}}}

The protocol is MOSS's own and made of text, so it stays text: the marks are part of what assistant and tool say. The
chat template `moss_sft`, which writes these as they are, gives XTuner's string. https://github.com/OpenLMLab/MOSS.
"""

from collections.abc import Mapping
from typing import Any

from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Conversation, Message, RawRecord
from mmft_plugins import _turns
from mmft_plugins._records import keys_found, shown, text_field

HUMAN, END_OF_HUMAN = "<|Human|>:", "<eoh>"
BEFORE_TOOL = ("Inner Thoughts", "Commands")


def moss_sft(record: RawRecord) -> Conversation | None:
    """System, then for each turn: question, thoughts and commands, results, answer.

    Everything the assistant writes is trained, the results never are. XTuner's `MOSSSFTDataset` trains the results' two
    marks as well; here they are context, because it is the runtime that writes them. A turn without "Commands" and
    "Tool Responses" is a question and an answer.
    """
    chat = record.get("chat")
    if not isinstance(chat, Mapping):
        raise DataError(f"'chat' must be an object of turns, found {shown(chat)}; keys found: {keys_found(record)}")
    meta = text_field(record, "meta_instruction", default="")
    messages = [_turns.message("system", meta)] if meta else []
    for number in range(1, _num_turns(record, chat) + 1):
        turn = chat.get(f"turn_{number}")
        if not isinstance(turn, Mapping):
            raise DataError(f"chat.turn_{number} must be an object, found {shown(turn)}")
        try:
            messages += _messages(turn)
        except DataError as error:
            raise DataError(f"chat.turn_{number}: {error}") from error
    return _turns.conversation(messages)


def _num_turns(record: RawRecord, chat: Mapping[str, Any]) -> int:
    given = record.get("num_turns", len(chat))
    try:
        return int(given)
    except (TypeError, ValueError) as error:
        raise DataError(f"'num_turns' must be a number, found {shown(given)}") from error


def _messages(turn: Mapping[str, Any]) -> list[Message]:
    question = text_field(turn, "Human").strip().removeprefix(HUMAN).removesuffix(END_OF_HUMAN).strip()
    before = "".join(text_field(turn, key, default="") for key in BEFORE_TOOL)
    results = text_field(turn, "Tool Responses", default="")
    answer = text_field(turn, "MOSS")
    asked = _turns.message("user", question)
    if not results:
        return [asked, _turns.message("assistant", before + answer)]
    called = [_turns.message("assistant", before)] if before else []
    return [asked, *called, _turns.message("tool", results), _turns.message("assistant", answer)]


def _example(question: str, thoughts: str, commands: str, results: str, answer: str) -> RawRecord:
    turn = {
        "Human": f"<|Human|>: {question}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thoughts}<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": f"<|Results|>: {results}<eor>\n",
        "MOSS": f"<|MOSS|>: {answer}<eom>\n",
    }
    return {"meta_instruction": "You may calculate.\n", "num_turns": 1, "chat": {"turn_1": turn}}


MOSS = DataMap(
    name="moss_sft",
    fn=moss_sft,
    summary="moss-003-sft with plugins; for the chat template moss_sft",
    columns=("meta_instruction", "chat.turn_1.Human", "chat.turn_1.MOSS"),
    examples=(
        _example("Name a colour.", "None", "None", "None", "Red."),
        _example(
            "What is 12 * 12?",
            "This needs a calculation.",
            'Calculate("12 * 12")',
            '\nCalculate("12 * 12") => 144\n',
            "It is 144.",
        ),
    ),
)
