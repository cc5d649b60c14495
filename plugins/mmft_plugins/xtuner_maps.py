"""The formats of XTuner's `dataset_map_fn` by their names, those that `text_sft`, `agent`, `llava`, `pretrain` lack.

Columns after https://github.com/InternLM/xtuner/tree/v0.1.23/xtuner/dataset/map_fns/dataset_map_fns; the system texts
are those of `system_texts`. Every map returns None for a blank answer. `xtuner` is the form all of them lead to there,
for data that was brought into it beforehand (`dataset_map_fn=None`).
"""

import re
from collections.abc import Callable, Iterable, Sequence

from mmft import hookimpl
from mmft.errors import DataError
from mmft.specs import DataMap
from mmft.types import Conversation, Document, RawRecord, Sample
from mmft_plugins import _plain_write, _turns
from mmft_plugins._records import object_list, shown, text_field
from mmft_plugins._sharegpt import SHAREGPT_MAPS
from mmft_plugins.system_texts import TEXTS
from mmft_plugins.text_sft import instructed

OASST1_MARK = re.compile(r"### (Human|Assistant):")


def alpaca_zh(record: RawRecord) -> Conversation | None:
    """`alpaca` with the columns of silk-road/alpaca-data-gpt4-chinese: `instruction_zh`, `input_zh`, `output_zh`."""
    return instructed(record, "_zh")


def arxiv(record: RawRecord) -> Conversation | None:
    """A title for an abstract."""
    return _asked(record, "abstract", "title", system=TEXTS["arxiv_gentile"])


def code_alpaca(record: RawRecord) -> Conversation | None:
    """`prompt` and `completion`, answered by a coder (HuggingFaceH4/CodeAlpaca_20K)."""
    return _asked(record, "prompt", "completion", system=TEXTS["coder"])


def colors(record: RawRecord) -> Conversation | None:
    """A colour for its description (burkelibbey/colors), less the name before the colon, which gives it away."""
    name, colon, described = text_field(record, "description").partition(":")
    return _turns.asked((described if colon else name).strip(), text_field(record, "color"), system=TEXTS["colorist"])


def crime_kg(record: RawRecord) -> Conversation | None:
    """`input` and `output`, answered by a lawyer (CrimeKgAssitant)."""
    return _asked(record, "input", "output", system=TEXTS["lawyer"])


def default(record: RawRecord) -> Conversation | None:
    """`input` and `output`."""
    return _asked(record, "input", "output")


def law_reference(record: RawRecord) -> Conversation | None:
    """`question` and `answer`, answered by a lawyer who names the statutes."""
    return _asked(record, "question", "answer", system=TEXTS["lawyer"])


def medical(record: RawRecord) -> Conversation | None:
    """`alpaca`, answered by a physician (shibing624/medical)."""
    return instructed(record, system=TEXTS["medical"])


def oasst1(record: RawRecord) -> Conversation | None:
    """One `text` of `### Human: ...### Assistant: ...` (timdettmers/openassistant-guanaco).

    A last question without an answer is left out, with a note. Other `###`, as in a Markdown heading, is text.
    """
    head, *pieces = OASST1_MARK.split(text_field(record, "text"))
    if not pieces or head.strip():
        raise DataError(f"'text' must begin with '### Human:' or '### Assistant:', found {shown(record['text'])}")
    turns = [
        _turns.message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    notes: tuple[str, ...] = ()
    if turns[-1].role == "user":
        turns, notes = turns[:-1], ("the last question has no answer",)
    return _turns.conversation(turns, notes=notes)


def openorca(record: RawRecord) -> Conversation | None:
    """`system_prompt`, `question`, `response` (Open-Orca/OpenOrca)."""
    return _asked(record, "question", "response", system=text_field(record, "system_prompt", default=""))


def sql(record: RawRecord) -> Conversation | None:
    """A query for a `context` of tables and a `question` (b-mc2/sql-create-context)."""
    question = f"{text_field(record, 'context')}\n{text_field(record, 'question')}"
    return _turns.asked(question, text_field(record, "answer"), system=TEXTS["sql"])


def stack_exchange(record: RawRecord) -> Conversation | None:
    """`question` and `response` (ArmelR/stack-exchange-instruction)."""
    return _asked(record, "question", "response")


def tiny_codes(record: RawRecord) -> Conversation | None:
    """`prompt` and `response`, answered by a coder (nampdn-ai/tiny-codes)."""
    return _asked(record, "prompt", "response", system=TEXTS["coder"])


def xtuner(record: RawRecord) -> Sample | None:
    """Turns of `system`, `input`, `output` in a list `conversation`, as docs/en/user_guides/dataset_format.md there.

    One turn without a question is a document, all of it trained. `output_with_loss` false keeps an answer untrained.
    """
    pieces = object_list(record, "conversation")
    if len(pieces) == 1 and not any(_said(pieces, 0, key).strip() for key in ("system", "input")):
        text = _said(pieces, 0, "output")
        return Document(text) if text.strip() else None
    turns = []
    for number, piece in enumerate(pieces):
        if system := _said(pieces, number, "system"):
            turns.append(_turns.message("system", system))
        trained = piece.get("output_with_loss", True)
        if not isinstance(trained, bool):
            raise DataError(f"conversation[{number}]: 'output_with_loss' must be true or false, found {shown(trained)}")
        turns.append(_turns.message("user", _said(pieces, number, "input")))
        turns.append(_turns.message("assistant", _said(pieces, number, "output"), loss=None if trained else False))
    return _turns.conversation(turns)


def _said(pieces: Sequence[RawRecord], number: int, key: str) -> str:
    try:
        return text_field(pieces[number], key, default=None if key == "output" else "")
    except DataError as error:
        raise DataError(f"conversation[{number}]: {error}") from error


def write_xtuner(sample: Sample) -> RawRecord:
    """The way back: question and answer in turn, the system text with the first of them."""
    if isinstance(sample, Document):
        return {"conversation": [{"input": "", "output": sample.text}]}
    system, pairs = _plain_write.split_pairs(_plain_write.turns(sample, "xtuner"), "xtuner")
    said = [{"input": question.text, "output": answer.text} for question, answer in pairs]
    return {"conversation": [{"system": system} | said[0] if system else said[0], *said[1:]]}


def _asked(record: RawRecord, question: str, answer: str, *, system: str = "") -> Conversation | None:
    return _turns.asked(text_field(record, question), text_field(record, answer), system=system)


def _row(
    fn: Callable[[RawRecord], Sample | None], summary: str, columns: tuple[str, ...], *values: tuple[str, ...]
) -> DataMap:
    """A format of plain columns, with an example for each row of values."""
    examples = tuple(dict(zip(columns, row, strict=True)) for row in values)
    return DataMap(name=fn.__name__, fn=fn, summary=summary, columns=columns, examples=examples)


@hookimpl
def mmft_data_maps() -> Iterable[DataMap]:
    """XTuner's formats of plain columns, and the conversations of ShareGPT and WizardLM."""
    yield from SHAREGPT_MAPS
    yield _row(
        alpaca_zh,
        "alpaca with instruction_zh, input_zh, output_zh",
        ("instruction_zh", "input_zh", "output_zh"),
        ("把数字相加。", "1, 2", "3"),
        ("说出一种颜色。", "", "红色。"),
    )
    yield _row(
        arxiv,
        "a title for an abstract, with the system text arxiv_gentile",
        ("abstract", "title"),
        ("We measure how long bread keeps.", "How Long Bread Keeps"),
        ("Cats sleep. We ask why.", "On the Sleep of Cats"),
    )
    yield _row(
        code_alpaca,
        "prompt_completion with the system text coder",
        ("prompt", "completion"),
        ("Add two numbers in Python.", "def add(a, b):\n    return a + b"),
        ("Print a line in C.", 'puts("a line");'),
    )
    yield _row(
        colors,
        "a colour for a description, with the system text colorist",
        ("description", "color"),
        ("Night Blue: a very dark blue, nearly black.", "#0a0a2a"),
        ("the colour of fresh grass", "#4caf50"),
    )
    yield _row(
        crime_kg,
        "input, output, with the system text lawyer",
        ("input", "output"),
        ("借款合同可以口头订立吗？", "自然人之间的借款可以口头约定。"),
        ("租房押金不退怎么办？", "可以先协商，协商不成可以起诉。"),
    )
    yield _row(default, "input, output", ("input", "output"), ("Name a colour.", "Red."), ("1 + 2 =", "3"))
    yield _row(
        law_reference,
        "question, answer, with the system text lawyer",
        ("question", "answer"),
        ("合同何时成立？", "承诺生效时合同成立，参见《民法典》第四百八十三条。"),
        ("几岁成年？", "十八周岁，参见《民法典》第十七条。"),
    )
    yield DataMap(
        name="medical",
        fn=medical,
        summary="alpaca with the system text medical",
        columns=("instruction", "output"),
        examples=(
            {"instruction": "感冒了怎么办？", "input": "", "output": "注意休息，多喝水。"},
            {"instruction": "这是什么症状？", "input": "头痛两天", "output": "原因很多，建议就医检查。"},
        ),
    )
    yield _row(
        oasst1,
        "one text of ### Human: and ### Assistant: turns",
        ("text",),
        ("### Human: Name a colour.### Assistant: Red.### Human: Another one?### Assistant: Blue.",),
        ("### Human: A heading, please.\n### Assistant: ### Colours\nRed.",),
    )
    yield _row(
        openorca,
        "system_prompt, question, response",
        ("system_prompt", "question", "response"),
        ("You answer briefly.", "Name a colour.", "Red."),
        ("", "1 + 2 =", "3"),
    )
    yield _row(
        sql,
        "a query for tables and a question, with the system text sql",
        ("context", "question", "answer"),
        ("CREATE TABLE cats (name TEXT)", "How many cats are there?", "SELECT COUNT(*) FROM cats"),
        ("CREATE TABLE t (a INT)", "What is the largest a?", "SELECT MAX(a) FROM t"),
    )
    yield _row(
        stack_exchange,
        "question, response",
        ("question", "response"),
        ("How do I undo a commit?", "With git revert."),
        ("What is a monad?", "A pattern."),
    )
    yield _row(
        tiny_codes,
        "prompt, response, with the system text coder",
        ("prompt", "response"),
        ("Reverse a list in Python.", "items[::-1]"),
        ("Loop ten times in C.", "for (int i = 0; i < 10; i++) {}"),
    )
    yield DataMap(
        name="xtuner",
        fn=xtuner,
        summary="XTuner's own form: conversation, a list of system, input, output; without input a document",
        columns=("conversation[].output",),
        examples=(
            {
                "conversation": [
                    {"system": "You answer briefly.", "input": "Name a colour.", "output": "Red."},
                    {"input": "And another one?", "output": "Blue."},
                ]
            },
            {"conversation": [{"input": "", "output": "Bread keeps for a week."}]},
        ),
        write=write_xtuner,
    )
