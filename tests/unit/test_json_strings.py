"""A text replaced in the strings of JSON: nothing else of the file changes, wherever its blocks are cut."""

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmft.data.json_strings import Change, replaced
from mmft.errors import DataError

TEXTS = st.text(st.sampled_from('ab"\\\n/é好\ud800😀'), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def cut(raw: bytes, size: int) -> list[bytes]:
    return [raw[start : start + size] for start in range(0, len(raw), size)]


def run(raw: bytes, old: str = "a", new: str = "b", *, size: int = 1 << 20, in_keys: bool = False) -> bytes:
    return b"".join(replaced(cut(raw, size), Change(old, new, in_keys), "a.json"))


def swapped(value: Any) -> Any:
    """What json itself would make of it."""
    if isinstance(value, str):
        return value.replace("a", "zz")
    if isinstance(value, list):
        return [swapped(item) for item in value]
    return {key: swapped(item) for key, item in value.items()} if isinstance(value, dict) else value


@settings(max_examples=150, deadline=None)
@given(VALUES, st.integers(1, 9), st.booleans(), st.sampled_from([None, 1]))
def test_values_are_replaced_wherever_blocks_are_cut(value: Any, size: int, escaped: bool, indent: int | None) -> None:
    raw = json.dumps(value, ensure_ascii=escaped, indent=indent).encode("utf-8", "replace")
    value = json.loads(raw)
    made = run(raw, new="zz", size=size)
    assert repr(json.loads(made)) == repr(swapped(value))
    assert run(raw, old="never", size=size) == raw


KEPT = b'\xef\xbb\xbf[ 1.10,1e2,-0.0 ,\t{"a" :"\\u0078", "a":NaN}\r\n, "\\/ \\u00e9", 1234567890123456789012345]\n\n'


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_numbers_keys_that_stand_twice_and_white_space_stay_byte_for_byte(size: int) -> None:
    assert run(KEPT, size=size) == KEPT
    assert run(KEPT, "x", "y", size=size) == KEPT.replace(b'"\\u0078"', b'"y"')
    assert run(KEPT, "é", "e", size=size) == KEPT.replace(b'"\\/ \\u00e9"', b'"/ e"')
    assert run(KEPT, "a", "k", size=size, in_keys=True) == KEPT.replace(b'"a"', b'"k"')


def test_two_keys_of_one_object_may_not_become_equal() -> None:
    with pytest.raises(DataError, match=r"a\.json: replacing 'a' in the keys \"b\" and \"a\" makes two keys equal"):
        run(b'{"b": 1, "a": 2}', in_keys=True)
    assert run(b'[{"b": 1}, {"a": {"b": 1}}]', in_keys=True) == b'[{"b": 1}, {"b": {"b": 1}}]'


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"", "column 1: the end; it is cut off, where a value is expected"),
        (b'{"a": "x', "column 7: a string that is not closed"),
        (b'[1,\n {"a": tru', "line 2 column 8: 'tru'"),
        (b'[1, "a\nb"]', "column 5: '\"a"),
        (b'["\\x"]', "column 2: "),
        (b"[1 2]", "column 4: '2]', where ',' or the end of the list or object is expected"),
        (b"[1,]", "column 4: ']', where a value is expected"),
        (b"{1: 2}", "column 2: '1: 2}', where a key in double quotes or '}' is expected"),
        (b'{"a" 2}', "column 6: '2}', where ':' is expected"),
        (b"[1}", "column 3: '}'"),
        (b"{]", "column 2: ']'"),
        (b"01", "column 2: '1', where nothing more is expected"),
        (b"1\n2", "line 2 column 1: '2', where nothing more is expected"),
        (b"[.5]", "column 2: '.5]'"),
    ],
)
def test_what_is_not_json_is_told_with_its_place(raw: bytes, error: str, size: int) -> None:
    with pytest.raises(ValueError):
        json.loads(raw)
    with pytest.raises(DataError) as caught:
        run(raw, size=size)
    place, _, what = error.partition(": ")
    said = str(caught.value)
    assert said.startswith(f"a.json: not JSON at {error}" if size == 1000 else f"a.json: not JSON at {place}: ")
    assert said.endswith(what.partition(", where ")[2])


def test_what_is_not_utf_8_is_told_with_its_byte() -> None:
    with pytest.raises(DataError, match=r"a\.json: not UTF-8 at byte 4: invalid continuation byte"):
        run(b'["\xc3\xa9\xc3("]', size=3)


def test_memory_does_not_grow_with_the_file() -> None:
    def blocks(number: int) -> Iterator[bytes]:
        yield b'["'
        for _ in range(number):
            yield b'text a \\n more", 1.5, "' * 1000
        yield b'"]'

    peaks = []
    for number in (20, 400):
        tracemalloc.start()
        assert sum(1 for _ in replaced(blocks(number), Change("a", "b"), "a.json")) > number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks
