"""One text for another in the strings of JSON, token by token; everything else is copied byte for byte.

Numbers keep their spelling, keys that stand twice stay, white space and a byte order mark too. What is in memory is one
block of the file, or one string where that is longer. A string is written anew only where the text is in it.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mmft.errors import DataError

_TEXT = rb'"[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*+)*+'
_TOKEN = re.compile(
    rb"[ \t\n\r]*+(?:(?P<string>" + _TEXT + rb'")|(?P<mark>[{}\[\],:])|'
    rb"(?P<plain>-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+|true|false|null|NaN|-?Infinity))"
)
_SPACE = re.compile(rb"[ \t\n\r]*+")
_OPEN = re.compile(_TEXT + rb"(?:\\(?:u[0-9a-fA-F]{0,3}+)?+)?+\Z")  # a string that goes on in the next block
_NEAR_END = 16  # bytes: a literal or a number that the end of a block cuts begins this close to it
_SHOWN = 20
VALUE, FIRST_VALUE, KEY, FIRST_KEY, COLON, NEXT, END = "value", "first value", "key", "first key", ":", "next", "end"
_EXPECTED = {
    VALUE: "a value", FIRST_VALUE: "a value or ']'", KEY: "a key in double quotes",
    FIRST_KEY: "a key in double quotes or '}'", COLON: "':'", NEXT: "',' or the end of the list or object",
    END: "nothing more",
}  # fmt: skip


@dataclass(slots=True)
class Change:
    """`new` for `old`, counted; `in_keys` also in the keys of objects."""

    old: str
    new: str
    in_keys: bool = False
    count: int = 0
    _bytes: bytes = field(init=False)

    def __post_init__(self) -> None:
        self._bytes = self.old.encode("utf-8", "surrogatepass")

    def may_be_in(self, raw: bytes) -> bool:
        """Whether JSON must be looked into: without escapes a text stands in it as it is."""
        return b"\\" in raw or self._bytes in raw

    def apply(self, raw: bytes) -> bytes:
        """A JSON string, quotes included, with every occurrence replaced."""
        if not self.may_be_in(raw):
            return raw
        text = str(json.loads(raw))
        found = text.count(self.old)
        self.count += found
        return _dumped(text.replace(self.old, self.new)) if found else raw


def _dumped(text: str) -> bytes:
    try:
        return json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8, but it has a JSON escape
        return json.dumps(text).encode()


class Token(NamedTuple):
    """`kind` is the mark itself, `string`, `plain` or, at the end of the text, empty."""

    kind: str
    start: int
    end: int


class Scanner:
    """The tokens of JSON text that comes in blocks. `done` collects what is behind the cursor, for the output."""

    def __init__(self, blocks: Iterable[bytes], where: str) -> None:
        self.where, self._blocks, self._decoder = where, iter(blocks), codecs.getincrementaldecoder("utf-8")()
        self.buffer, self.at, self.copied = b"", 0, 0
        self.done: list[bytes] = []
        self._read = self._line = self._column = 0  # bytes read; lines and bytes of a line before the buffer
        while len(self.buffer) < len(codecs.BOM_UTF8) and self._more():
            pass
        self.at = 3 if self.buffer.startswith(codecs.BOM_UTF8) else 0

    def next(self) -> Token:
        """The next token. Raises `DataError` where there is none."""
        while True:
            found = _TOKEN.match(self.buffer, self.at)
            held = len(self.buffer) - len("e+")  # what of a number may stand there before its next digit
            if found and (found.lastgroup != "plain" or found.end() < held or not self._more()):
                kind = found.lastgroup or ""
                self.at, start = found.end(), found.start(kind)
                return Token(chr(self.buffer[start]) if kind == "mark" else kind, start, self.at)
            if found:
                continue  # a number may go on in the block that was read
            start = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            is_open = _OPEN.match(self.buffer, start) is not None
            is_cut = is_open or len(self.buffer) - start < _NEAR_END
            if not is_cut or not self._more():
                if start == len(self.buffer):
                    self.at = start
                    return Token("", start, start)
                raise self.error(start, "a string that is not closed" if is_open else "")

    def replace(self, token: Token, new: bytes) -> None:
        """Write something else for the token that was given last."""
        self.done += (self.buffer[self.copied : token.start], new)
        self.copied = token.end

    def taken(self) -> bytes:
        """What is behind the cursor and was not taken before."""
        taken = b"".join((*self.done, self.buffer[self.copied : self.at]))
        self.done, self.copied = [], self.at
        return taken

    def error(self, start: int, found: str = "", expected: str = "") -> DataError:
        """A syntax error at a place of the buffer."""
        newline = self.buffer.rfind(b"\n", 0, start)
        line = self._line + self.buffer.count(b"\n", 0, start) + 1
        column = start - newline if newline >= 0 else self._column + start + 1
        place = f"line {line} column {column}" if line > 1 else f"column {column}"
        rest = self.buffer[start : start + _SHOWN].decode("utf-8", "replace")
        said = found or (repr(rest) if rest else "the end; it is cut off")
        allowed = f", where {expected} is expected" if expected else ""
        return DataError(f"{self.where}: not JSON at {place}: {said}{allowed}")

    def _more(self) -> bool:
        """Read on, and forget what is behind the cursor, into `done`. False at the end of the file."""
        blocks: list[bytes] = []
        missing = max(1, len(self.buffer) - self.at)  # doubles what is held: a huge string is looked at a few times
        while missing > 0 and (block := next(self._blocks, b"")):
            self._refuse_other_encodings(block)
            blocks.append(block)
            missing -= len(block)
        if not blocks:
            return False
        self.done.append(self.buffer[self.copied : self.at])
        behind = self.buffer[: self.at]
        self._line += behind.count(b"\n")
        last = behind.rfind(b"\n")
        self._column = len(behind) - last - 1 if last >= 0 else self._column + len(behind)
        self.buffer = b"".join((self.buffer[self.at :], *blocks))
        self.at = self.copied = 0
        return True

    def _refuse_other_encodings(self, block: bytes) -> None:
        held = len(self._decoder.getstate()[0])
        try:
            self._decoder.decode(block)
        except UnicodeDecodeError as error:
            byte = self._read - held + error.start
            raise DataError(f"{self.where}: not UTF-8 at byte {byte}: {error.reason}") from error
        self._read += len(block)


def replaced(blocks: Iterable[bytes], change: Change, where: str) -> Iterator[bytes]:
    """The JSON text with the change made, in blocks.

    Raises `DataError` for what is not one JSON value in UTF-8, and where the change makes two keys of an object equal.
    """
    scanner, expected = Scanner(blocks, where), VALUE
    inside: list[dict[bytes, bytes] | None] = []  # of each open object its keys, changed -> as read; of a list None
    while True:
        token = scanner.next()
        kind = token.kind
        if kind == "string" and expected in (KEY, FIRST_KEY):
            if change.in_keys:
                _replace_key(scanner, token, change, inside[-1])
            expected = COLON
        elif kind in ("string", "plain") and expected in (VALUE, FIRST_VALUE):
            raw = scanner.buffer[token.start : token.end]
            if kind == "string" and (new := change.apply(raw)) is not raw:
                scanner.replace(token, new)
            expected = NEXT if inside else END
        elif kind in ("{", "[") and expected in (VALUE, FIRST_VALUE):
            inside.append({} if kind == "{" else None)
            expected = FIRST_KEY if kind == "{" else FIRST_VALUE
        elif kind == ":" and expected == COLON:
            expected = VALUE
        elif kind == "," and expected == NEXT:
            expected = VALUE if inside[-1] is None else KEY
        elif (kind == "}" and expected in (NEXT, FIRST_KEY) and inside[-1] is not None) or (
            kind == "]" and expected in (NEXT, FIRST_VALUE) and inside[-1] is None
        ):
            inside.pop()
            expected = NEXT if inside else END
        elif not kind and expected == END:
            yield scanner.taken()
            return
        else:
            raise scanner.error(token.start, expected=_EXPECTED[expected])
        if scanner.done:
            yield scanner.taken()


def _replace_key(scanner: Scanner, token: Token, change: Change, keys: dict[bytes, bytes] | None) -> None:
    raw = scanner.buffer[token.start : token.end]
    new = change.apply(raw)
    assert keys is not None
    if keys.setdefault(new, raw) != raw:
        names = f"{keys[new].decode()} and {raw.decode()}"
        raise DataError(f"{scanner.where}: replacing {change.old!r} in the keys {names} makes two keys equal")
    if new is not raw:
        scanner.replace(token, new)
