"""Exact-match accuracy on held-out questions, beside the answer that needs no model.

Each question is asked on its own, with its pictures, in a fresh conversation: nothing of the reference answers is in
the prompt. With `ask_first` the conversation opens with that request and the model's own answer to it ("Describe the
picture."), then comes the question. An answer counts when it equals the reference, case and outer whitespace aside.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmft.config import Dataset
from mmft.data.formats import recognise, source_use
from mmft.data.records import iterate_samples
from mmft.errors import DataError
from mmft.inference import Assistant, Generation, user_message
from mmft.plugins import Plugins
from mmft.types import Conversation, Message, Text


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, what should come, and the kind of question it is."""

    conversation: Conversation
    reference: str
    kind: str

    @property
    def text(self) -> str:
        """The question itself, which the baseline looks up."""
        return self.conversation.messages[-1].text.strip()


@dataclass(frozen=True, slots=True)
class Answered:
    """One line of answers.jsonl."""

    question: str
    images: tuple[str, ...]
    kind: str
    reference: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class Result:
    """Accuracies by kind, and those of the baseline; `overall` is over all questions."""

    answers: tuple[Answered, ...]
    baseline: dict[str, float]
    seconds: float

    @property
    def accuracy(self) -> dict[str, float]:
        """Share of right answers, overall and by kind."""
        return _by_kind([(a.kind, a.correct) for a in self.answers])

    def table(self) -> list[tuple[str, ...]]:
        """Rows of kind, questions, accuracy, baseline."""
        counts = Counter(a.kind for a in self.answers)
        counts["overall"] = len(self.answers)
        rows: list[tuple[str, ...]] = [("kind", "questions", "accuracy", "most frequent answer")]
        for kind, accuracy in self.accuracy.items():
            base = f"{self.baseline[kind]:.3f}" if kind in self.baseline else "-"
            rows.append((kind, str(counts[kind]), f"{accuracy:.3f}", base))
        return rows


def file_dataset(
    path: Path,
    plugins: Plugins,
    *,
    data_map: str | None = None,
    source: str | None = None,
    source_options: Mapping[str, Any] | None = None,
    image_folder: Path | None = None,
) -> Dataset:
    """A file, a folder or a glob as a dataset of a config, by the rules of `mmft data check`.

    The source is the one that claims the suffix, the format the one the records look like, where they are not named.
    Raises `DataError` and `AmbiguousName` as `source_use` and `recognise` do, and `UnknownName`.
    """
    reading = source_use(path, plugins, source, source_options)
    files = plugins.datasets.get(reading.name).files
    for file in files(**reading.options) if files else ():
        if not Path(file).exists():
            raise DataError(f"{file}: no such file")
    found = plugins.data_maps.get(data_map).name if data_map else recognise(reading, plugins)[0][0][0].name
    return Dataset(source=reading, data_map=data_map or found, image_folder=image_folder)


def read_questions(dataset: Dataset, plugins: Plugins, *, kind_key: str = "kind") -> list[Question]:
    """Every answered user turn of a dataset as a question of its own; `kind_key` names a record's list of kinds.

    A later turn keeps its conversation's pictures and loses its text history: questions here stand alone. Raises
    `DataError` for a record that cannot be read, with its number, and where no user turn has an answer.
    """
    where = dataset.source.options.get("path")
    questions = []
    for number, record, sample in iterate_samples(dataset, plugins):
        if not isinstance(sample, Conversation):
            document = f"is a document, read as {dataset.data_map}; eval asks conversations"
            reason = f"{sample}; `mmft data check {where}` lists all such records"
            raise DataError(f"{where} record {number}: {reason if isinstance(sample, str) else document}")
        kinds = record.get(kind_key) or []
        images = sample.images
        pairs = [
            (asked, reply)
            for asked, reply in zip(sample.messages, sample.messages[1:], strict=False)
            if asked.role == "user" and reply.role == "assistant"
        ]
        system = tuple(message for message in sample.messages if message.role == "system")
        for index, (asked, reply) in enumerate(pairs):
            turn = asked if asked.images or not images else _with_pictures(pairs[0][0], asked)
            kind = str(kinds[index]) if isinstance(kinds, list) and index < len(kinds) else "answers"
            questions.append(Question(Conversation((*system, turn)), reply.text, kind))
    if not questions:
        raise DataError(f"{where}: no question with an answer, read as {dataset.data_map}; eval asks user turns and "
                        "compares what comes with the assistant turn that follows")  # fmt: skip
    return questions


def _with_pictures(first: Message, asked: Message) -> Message:
    """A later question, shown the pictures of the first the way the first shows them."""
    lead = tuple(Text("\n") if isinstance(part, Text) else part for part in first.parts)
    return Message("user", (*lead, *asked.parts))


def evaluate(
    assistant: Assistant,
    questions: Sequence[Question],
    *,
    training: Iterable[Question] = (),
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    ask_first: str | None = None,
) -> Result:
    """Ask the questions (a fixed random `limit` of them), greedily, in batches of like length."""
    asked = list(questions)
    if limit is not None and limit < len(asked):
        asked = random.Random(seed).sample(asked, limit)
    asked.sort(key=lambda question: len(question.text))
    began = time.monotonic()
    generation = Generation(max_new_tokens=max_new_tokens)

    def reply_to(conversations: Sequence[Conversation]) -> list[str]:
        parts = [conversations[start : start + batch_size] for start in range(0, len(conversations), batch_size)]
        return [answer for part in parts for answer in assistant.answer_batch(part, generation)]

    conversations = [question.conversation for question in asked]
    if ask_first is not None:
        conversations = _after_own_answer(conversations, ask_first, reply_to)
    answers = []
    for question, answer in zip(asked, reply_to(conversations), strict=True):
        correct = _normal(answer) == _normal(question.reference)
        images = tuple(str(image.source) for image in question.conversation.images)
        answers.append(Answered(question.text, images, question.kind, question.reference, answer, correct))
    return Result(tuple(answers), baseline(asked, training), time.monotonic() - began)


def _after_own_answer(
    conversations: Sequence[Conversation], ask_first: str, reply_to: Callable[[Sequence[Conversation]], list[str]]
) -> list[Conversation]:
    """Each conversation with a first turn before it, answered by the model itself, once for the same pictures."""
    openings = {_before(c): _opening(c, ask_first) for c in conversations}
    replies = dict(zip(openings, reply_to(list(openings.values())), strict=True))
    longer = []
    for conversation in conversations:
        key = _before(conversation)
        own = Message("assistant", (Text(replies[key]),))
        asked = user_message(conversation.messages[-1].text.strip())
        longer.append(Conversation((*openings[key].messages, own, asked)))
    return longer


def _before(conversation: Conversation) -> tuple[object, ...]:
    """What the opening depends on: the system messages and the pictures."""
    return (*conversation.messages[:-1], *conversation.images)


def _opening(conversation: Conversation, text: str) -> Conversation:
    """The request in the question's place, with its pictures."""
    asked = user_message(text, [image.source for image in conversation.images])
    return Conversation((*conversation.messages[:-1], asked))


def baseline(asked: Sequence[Question], training: Iterable[Question]) -> dict[str, float]:
    """The accuracy of giving each question its most frequent training answer, and unknown ones the most frequent."""
    by_text: dict[str, Counter[str]] = {}
    every: Counter[str] = Counter()
    for question in training:
        by_text.setdefault(question.text, Counter())[_normal(question.reference)] += 1
        every[_normal(question.reference)] += 1
    if not every:
        return {}
    fallback = every.most_common(1)[0][0]
    guesses = {text: answers.most_common(1)[0][0] for text, answers in by_text.items()}
    return _by_kind([(q.kind, guesses.get(q.text, fallback) == _normal(q.reference)) for q in asked])


def _by_kind(results: Sequence[tuple[str, bool]]) -> dict[str, float]:
    shares = {"overall": sum(right for _, right in results) / max(1, len(results))}
    for kind in sorted({kind for kind, _ in results}):
        own = [right for k, right in results if k == kind]
        shares[kind] = sum(own) / len(own)
    return shares


def _normal(text: str) -> str:
    return text.strip().lower()


def write_result(result: Result, folder: Path) -> None:
    """eval.json with the figures and answers.jsonl with every answer."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "accuracy": result.accuracy,
        "baseline": result.baseline,
        "questions": len(result.answers),
        "seconds": round(result.seconds, 1),
    }
    (folder / "eval.json").write_text(json.dumps(figures, indent=2), "utf-8")
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in result.answers)
    (folder / "answers.jsonl").write_text(lines, "utf-8")
