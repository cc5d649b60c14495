"""What can be said to `mmft web` about its page and its server. Needs no gradio."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmft.errors import DataError, MmftError
from mmft.generation import Generation
from mmft.images import FORMATS

MOST_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where the page is, and for whom. `auth` are `USER:PASSWORD`; `max_upload` is in MB, for each picture."""

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    auth: Sequence[str] = ()
    max_upload: int = 20


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """What the page begins with; a visitor may change `system` and `generation`. `examples` are pictures."""

    system: str | None = None
    generation: Generation = field(default_factory=Generation)
    max_context: int | None = None
    max_waiting: int = 64  # questions in the queue; the page says so to those beyond
    language: str = "auto"
    examples: Sequence[Path] = ()


def logins(auth: Sequence[str]) -> list[tuple[str, str]]:
    """User and password of each `USER:PASSWORD`. Raises `MmftError`, which does not repeat the password."""
    pairs = [given.partition(":") for given in auth]
    for user, _, password in pairs:
        if not user or not password:
            raise MmftError("--auth: one of them is not USER:PASSWORD, with neither empty")
    if len({user for user, _, _ in pairs}) < len(pairs):
        raise MmftError("--auth: the same user is given twice; give each a name of its own")
    return [(user, password) for user, _, password in pairs]


def example_pictures(folder: Path | None) -> list[Path]:
    """The first pictures of a folder by name. Raises `DataError` where it has none."""
    if folder is None:
        return []
    if not folder.is_dir():
        raise DataError(f"--examples {folder}: no such folder")
    endings = {f".{name.lower()}" for name in FORMATS} | {".jpg", ".tif"}
    pictures = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in endings]
    if not pictures:
        raise DataError(f"--examples {folder}: no pictures in it; allowed are {', '.join(sorted(endings))}")
    return pictures[:MOST_EXAMPLES]


def short_names(references: Sequence[str]) -> list[str]:
    """Names for the page: the last parts of each path, as many as tell them apart.

    Of runs `work_dirs/base/final` and `work_dirs/tuned/final` they are `base` and `tuned`.
    """
    parts = [Path(reference.removesuffix("/final")).parts for reference in references]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(names) and not any(name.startswith("checkpoint-") for name in names):
            return names
    return list(references)
