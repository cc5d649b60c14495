"""What a user can do something about.

Every error a user can cause is an `MmftError` with one line that says where, what was found, what is allowed and
what to do. The command line prints that line and exits 2; any other exception is a bug of ours and keeps its
traceback. All of them survive pickling, because DataLoader workers raise them too.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

SLIP, ALIKE = 0.92, 0.61  # difflib's ratio; below the second, short names resemble anything


class MmftError(Exception):
    """Base of all errors a user can mend."""


class DataError(MmftError):
    """A record, an image or a source file is not what it should be."""


class ModelError(MmftError):
    """A model path, a weight file or the parts of a model do not fit together."""


class CheckpointError(MmftError):
    """A checkpoint or model folder is incomplete, damaged, or belongs to another config."""


class TrainingError(MmftError):
    """A run cannot go on: a number that is not finite, or a part that is to be trained and learns nothing."""


class PluginError(MmftError):
    """A plugin offers something that is not what the hook asks for."""


class UnknownName(MmftError):
    """A name that no plugin offers."""


class AmbiguousName(MmftError):
    """A short name that several plugins offer; the qualified name `plugin/name` is needed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a config: `where` is a path such as `model.llm.path`, `hint` says what to do."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.hint}" if self.hint else "")


class ConfigError(MmftError):
    """All problems of a config, collected before it is raised."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [line for problem in self.problems for line in f"  - {problem}".splitlines()]
        notes = {line: index for index, line in reversed(list(enumerate(lines))) if line.lstrip().startswith("note: ")}
        once = [line for index, line in enumerate(lines) if notes.get(line, index) == index]
        return "\n".join([f"{len(self.problems)} problems in the config:", *once])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the closest of the known names, or an empty string."""
    close = closest(name, known)
    return f"; did you mean {close[0]!r}?" if close else ""


def closest(name: str, known: Iterable[str], number: int = 1) -> list[str]:
    """The known names that a person may have meant, the likeliest first, at most so many.

    First a slip of the pen; then a name that goes on where this one ends (`llama3`: `llama3_chat`, and other versions
    such as `llama3_1` after it); then the longest name that is in this one (`alpaca_map_fn`: `alpaca`); then one that
    is spelled alike. Case, and what stands between words, make no difference.
    """
    typed = _words(name)
    by_words = {_words(one): one for one in sorted(known)}
    spelled = {"_".join(words): one for words, one in by_words.items()}

    def alike(cutoff: float) -> list[str]:
        return [spelled[text] for text in get_close_matches("_".join(typed), spelled, number, cutoff)]

    longer = [words for words in by_words if typed and words[: len(typed)] == typed and words != typed]
    longer.sort(key=lambda words: (words[len(typed)][0].isdigit(), len("".join(words))))
    places = {words: [at for at in range(len(typed)) if typed[at : at + len(words)] == words] for words in by_words}
    within = sorted(
        (words for words in by_words if words and places[words]), key=lambda words: (len("".join(words)), places[words])
    )
    found = [*alike(SLIP), *(by_words[words] for words in (*longer, *reversed(within))), *alike(ALIKE)]
    return list(dict.fromkeys(found))[:number]


def _words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\W_]+", name.lower()) if word)
