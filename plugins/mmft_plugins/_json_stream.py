"""A JSON file of any size, record by record: what is in memory is one record and one block of the file.

`json.JSONDecoder.raw_decode` does the parsing, at the speed of `json.loads`; here is only what stands between the
records. A record that ends with the block is parsed again once more of the file is there.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mmft.errors import DataError
from mmft_plugins._files import kind, text_blocks
from mmft_plugins._records import keys_found, shown

_SPACE = re.compile(r"[ \t\n\r]*")
_ALLOWED = "allowed: a list of objects, or an object holding exactly one such list"
NAMED = 10  # keys of an object that an error names
_NEAR_END = 16  # characters: a literal, a number or an escape that is cut off is reported this close to the end
# What is left, from the place of the error on, of a text that ends inside a literal, a number or an escape.
_CUT_OFF = re.compile(r"t(ru?)?|f(a(ls?)?)?|n(ul?)?|N(aN?)?|-?I[nfity]*|-|[.eE][+-]?|\\?u[0-9a-fA-F]{0,4}")


def is_cut_off(rest: str, message: str) -> bool:
    """Whether what is not JSON could be the beginning of JSON; `rest` is what stands from the error on."""
    rest = rest.strip()
    return not rest or message.startswith("Unterminated string") or _CUT_OFF.fullmatch(rest) is not None


class JsonReader:
    """A cursor over the text of one JSON file."""

    def __init__(self, file: Path, blocks: Iterable[str]) -> None:
        self.file = file
        self._blocks = iter(blocks)
        self._text = ""  # what is read and not yet done with
        self._at = 0  # the cursor, in _text
        self._line = 1  # of the first character of _text, from 1
        self._column = 1
        self._ended = False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space, without moving past it; empty at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Move past the character `peek` gave."""
        self._at += 1

    def value(self, inside: str) -> Any:
        """The value at the cursor, and the cursor behind it. `inside` says which one, for an error."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _NEAR_END
                if cut_off and self._more():
                    continue
                raise self.error(error.msg, error.pos, inside if cut_off else "") from error
            except RecursionError as error:
                where = f"{self.file}: {inside}" if inside else f"{self.file}"
                raise DataError(f"{where}: nested too deeply to be read; flatten it, or take it out") from error
            if end < len(self._text) or not self._more():  # a number may go on in the next block
                self._at = end
                return value

    def items(self, inside: str) -> Iterator[tuple[int, Any]]:
        """(number from 1, item) of the list that begins at the cursor."""
        self.skip()
        number = 0
        if self.peek() == "]":
            self.skip()
            return
        while True:
            number += 1
            yield number, self.value(f"{inside}record {number}")
            following = self.peek()
            if following not in (",", "]"):
                raise self.error("Expecting ',' delimiter", self._at, f"{inside}record {number + 1}")
            self.skip()
            if following == "]":
                return

    def members(self) -> Iterator[str]:
        """The keys of the object that begins at the cursor, each with the cursor before its value.

        Whoever iterates moves past the value before asking for the next key.
        """
        self.skip()
        if self.peek() == "}":
            self.skip()
            return
        while True:
            if self.peek() != '"':
                raise self.error("Expecting property name enclosed in double quotes", self._at, "the object")
            key: str = self.value("the object")
            if self.peek() != ":":
                raise self.error("Expecting ':' delimiter", self._at, "the object")
            self.skip()
            self.peek()
            yield key
            following = self.peek()
            if following not in (",", "}"):
                raise self.error("Expecting ',' delimiter", self._at, "the object")
            self.skip()
            if following == "}":
                return

    def end(self) -> None:
        """Raise `DataError` unless only white space follows."""
        if self.peek():
            raise self.error("Extra data", self._at, "")

    def error(self, message: str, position: int, inside: str) -> DataError:
        """A syntax error at a position of the text held; `inside`, where the file may end too early, says in what."""
        line = self._line + self._text.count("\n", 0, position)
        newline = self._text.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else self._column + position
        place = f"line {line} column {column}" if line > 1 else f"column {column}"
        if inside and self._ended and is_cut_off(self._text[position:], message):
            near = position > len(self._text.rstrip()) - _NEAR_END - 1  # of a quote that is missing, it may stand far
            remedy = "if it is cut off, copy or download it again" if near else "a quote is missing, or it is cut off"
            hint = f"; the file ends inside {inside}: {remedy}"
        elif self._line == self._column == 1 and not self._text[:position].strip():
            hint = f"; the file begins with {shown(self._text[position : position + 40])}; give the JSON file"
        elif message == "Extra data":
            hint = (
                "; a file of one object a line is 'jsonl': in a config use(\"jsonl\", ...), for a file --source jsonl, "
                f"or call it {self.file.stem}.jsonl"
            )
        else:
            hint = "; mend the file there, or write it again"
        return DataError(f"{self.file}: not JSON at {place}: {message}{hint}")

    def _more(self) -> bool:
        """Read on, and forget what is behind the cursor. False, with nothing changed, at the end of the file."""
        blocks: list[str] = []
        missing = max(1, len(self._text) - self._at)  # doubles what is held: a huge record is parsed a few times only
        while missing > 0 and (block := next(self._blocks, "")):
            blocks.append(block)
            missing -= len(block)
        if not blocks:
            self._ended = True
            return False
        newlines = self._text.count("\n", 0, self._at)
        last = self._text.rfind("\n", 0, self._at)
        self._line += newlines
        self._column = self._at - last if newlines else self._column + self._at
        self._text = "".join([self._text[self._at :], *blocks])
        self._at = 0
        return True


def json_records(file: Path, field: str | None = None) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file that is a list of objects, or an object holding one; `field` names the one to take.

    An object is read twice, first to see which of its values is the list. Raises `DataError`.
    """
    reader = JsonReader(file, text_blocks(file))
    first = reader.peek()
    if not first:
        raise DataError(f"{file}: the file is empty; {_ALLOWED}")
    if first == "[":
        if field is not None:
            raise DataError(f"{file}: a list has no field {field!r}; leave the option out")
        for number, record in reader.items(""):
            yield f"record {number}", record
        reader.end()
        return
    if first != "{":
        value = reader.value("")
        reader.end()
        raise DataError(f"{file}: {kind(value)}; {_ALLOWED}")
    chosen = _the_list(reader, field)
    reader = JsonReader(file, text_blocks(file))
    reader.peek()
    for key in reader.members():
        if key == chosen:
            for number, record in reader.items(f"{key!r}, "):
                yield f"record {number}", record
            return
        _pass_over(reader, key)


def _the_list(reader: JsonReader, field: str | None) -> str:
    """The key of the one list of objects; reads the whole file."""
    lists: list[str] = []
    keys: dict[str, None] = {}
    for key in reader.members():
        if key in keys:
            raise DataError(f"{reader.file}: the key {key!r} is there twice; a key may be used once")
        keys[key] = None
        if _pass_over(reader, key):
            lists.append(key)
    reader.end()
    if field is not None:
        lists = [key for key in lists if key == field]
    if len(lists) == 1:
        return lists[0]
    asked = "" if field is None else f" under {field!r}"
    more = f"; choose one with the option field={lists[0]!r}" if len(lists) > 1 else ""
    others = f" and {len(keys) - NAMED:,} more" if len(keys) > NAMED else ""
    named = keys_found(dict.fromkeys(islice(keys, NAMED)))
    raise DataError(
        f"{reader.file}: an object with {len(lists)} lists of objects{asked} (keys: {named}{others}); {_ALLOWED}{more}"
    )


def _pass_over(reader: JsonReader, key: str) -> bool:
    """Move past a value, a list item by item. True for a list that begins with an object."""
    if reader.peek() != "[":
        reader.value(f"{key!r}")
        return False
    of_objects = False
    for number, item in reader.items(f"{key!r}, "):
        of_objects = of_objects or (number == 1 and isinstance(item, dict))
    return of_objects
