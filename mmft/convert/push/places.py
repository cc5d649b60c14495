"""Places of this machine in texts and in JSON: what one looks like, and what it becomes in a file for others.

A place is a path from the root, a drive, a server's share or the home folder. With one part alone it is not told from a
word such as `/no_think`, and stays. URLs, `</tags>` and relative paths are none.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

HUB_CACHE = re.compile(r".*[/\\](?:models--)?([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]([\w.-]+)/?")
PLACE = re.compile(  # a whole string: its parts may have spaces inside, as `acme corp`
    r"(?:file://)?(?:(?:~[\w.-]*|\.\.|[A-Za-z]:)[/\\]+|//?|\\\\)"
    r"[^/\\\s](?:[^/\\\n]*[^/\\\s])?(?:[/\\]+[^/\\\s](?:[^/\\\n]*[^/\\\s])?)*[/\\]*"
)
_PART = r"[^/\\\s<>\"'`|*?{}:;,()\[\]“”‘’，。；：、（）「」《》]+"
_FOLDER = rf"{_PART}(?: {_PART}){{0,4}}[/\\]+"  # spaces only where a separator follows
_SANDBOX = r"(?!/mnt/data(?![\w/\\.-]))"  # what a model is told of its own Python tool, in the template of GLM-4
IN_TEXT = re.compile(
    rf"(?<![\w.<~/\\-]){_SANDBOX}(?:file://)?"
    rf"(?:~[\w.-]*/|[A-Za-z]:[/\\]+|\\\\[\w.-]+\\(?=[\w$])|/{_FOLDER})(?:{_FOLDER})*{_PART}[/\\]?"
)
# Templates and regular expressions are full of slashes, and name nobody's folders.
NO_PLACES = {
    "chat_template", "added_tokens_decoder", "targets", "target_modules", "exclude_modules", "modules_to_save",
    "layers_pattern", "rank_pattern", "alpha_pattern",
}  # fmt: skip
EXAMPLES = re.compile(r"/(?:path/to|usr|bin|dev|proc|etc)/")  # of every machine, or of none


def without_places(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """JSON without the places of this machine: a hub's cache becomes the hub's name, any other place its last part.

    `names` says what single strings become, such as the path of a base model its name on the hub.
    """
    if isinstance(value, dict):
        return {
            without_places(key, names): item if key in NO_PLACES else without_places(item, names)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_places(item, names) for item in value]
    if not isinstance(value, str):
        return value
    if names and value in names:
        return names[value]
    return _shortened(value) if _is_place(value) else plain_text(value)


def _is_place(text: str) -> bool:
    return bool(PLACE.fullmatch(text)) and len(re.findall(r"[/\\]+", text.removeprefix("\\\\"))) > 1


def _shortened(place: str) -> str:
    cached = HUB_CACHE.fullmatch(place)
    return f"{cached[1]}/{cached[2]}" if cached else last_part(place)


def last_part(place: str) -> str:
    """The name of a file or folder, of this system's paths and of Windows'."""
    return re.split(r"[/\\]", place.rstrip("/\\"))[-1]


def plain_text(text: str) -> str:
    """A text in which each absolute path is its last part."""
    if "/" not in text and "\\" not in text:
        return text
    return IN_TEXT.sub(lambda found: _shortened(found[0]), text)


def places_in(value: Any) -> Iterator[str]:
    """Absolute paths in a text, or in the keys and strings of JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places_in(key)
            if key not in NO_PLACES:
                yield from places_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from places_in(item)
    elif isinstance(value, str) and ("/" in value or "\\" in value):
        yield from (found[0] for found in IN_TEXT.finditer(value) if not EXAMPLES.match(found[0]))
