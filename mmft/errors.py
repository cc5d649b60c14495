"""What a user can do something about.

Every error a user can cause is an `MmftError` with one line that says where, what was found, what is allowed and
what to do. The command line prints that line and exits 2; any other exception is a bug of ours and keeps its
traceback. All of them survive pickling, because DataLoader workers raise them too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


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
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems in the config:\n{lines}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the closest of the known names, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
