"""The `jsonl` source: damaged lines, files that are cut off, and the way straight to a record."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from mmft.errors import DataError
from mmft.types import BadRecord
from mmft_plugins.sources import line_index, load_jsonl, load_jsonl_from


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


DAMAGED = {
    b'{"a": }': "not JSON: a.jsonl line 3 column 7: Expecting value (the line starts at byte 10); mend the line or",
    b'{"a": 1} {"b": 2}': "not JSON: a.jsonl line 3 column 10: Extra data (the line starts at byte 10); mend the line",
    b'{"a": "b': "not JSON: a.jsonl line 3 column 7: Unterminated string starting at (the line starts at byte 10); ",
    b'{"a": "caf\xe9"}': "not UTF-8: a.jsonl line 3 at byte 10 of the line, 20 of the file: invalid continuation byte",
    b"[" * 200_000: "nested too deeply: a.jsonl line 3 holds lists or objects in one another beyond what can be read",
    b"[1]": "not an object: a.jsonl line 3 is a list, found [1]; a record is an object {...}",
    b'"x"': "not an object: a.jsonl line 3 is a string, found 'x'; a record is an object {...}",
}


@pytest.mark.parametrize("line", DAMAGED, ids=lambda line: line[:18].decode("latin-1"))
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_damaged_line_is_a_bad_record_and_the_rest_is_read(
    line: bytes, end: bytes, write: Callable[..., Path]
) -> None:
    file = write("a.jsonl", end.join([b'{"n": 1}', b"", line, b'{"n": 2}']).replace(end, b"\n", 1))
    first, bad, last = load_jsonl(file)
    assert (first, last) == ({"n": 1}, {"n": 2})
    assert isinstance(bad, BadRecord)
    if end == b"\n":
        assert bad.reason.startswith(DAMAGED[line]) and len(bad.reason) < 250
    assert list(load_jsonl_from(1, file)) == [bad, last]
    assert list(load_jsonl_from(2, file)) == [last]


@pytest.mark.parametrize("first", ["[", '[{"a": 1},', "{"])
def test_a_file_that_is_json_over_several_lines_is_not_read_line_by_line(
    first: str, write: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match=r"a.jsonl: not one object a line: its first line is .* is 'json'"):
        list(load_jsonl(write("a.jsonl", first + '\n{"a": 2}]\n')))


WHOLE = '{"a": [1.5, true], "b\\u0041": null, "ä": {"c": -1e-5, "d": "e"}}'


@pytest.mark.parametrize("cut", range(1, len(WHOLE.encode())))
def test_a_file_that_ends_inside_its_last_line_is_not_taken_for_whole(cut: int, write: Callable[..., Path]) -> None:
    records = load_jsonl(write("a.jsonl", b'{"a": 1}\n' + WHOLE.encode()[:cut]))
    assert next(records) == {"a": 1}
    with pytest.raises(DataError, match=r"a.jsonl line 2: the file ends inside this line, .* byte 9: .*download it"):
        next(records)


@pytest.mark.parametrize("line", ['{"a": }', '{"a" 1}', "{'a': 1}", "nothing", '{"a": 1}}', '{"a": 1,}'])
def test_a_last_line_that_is_damaged_is_not_said_to_be_cut_off(line: str, write: Callable[..., Path]) -> None:
    _, bad = load_jsonl(write("a.jsonl", '{"a": 1}\n' + line))
    assert isinstance(bad, BadRecord) and bad.reason.startswith("not JSON: a.jsonl line 2 column ")


LINES = b'\xef\xbb\xbf\n  {"n": 0}\n\n{"n": 1}\r\n \t\r\n[]\n\xef\xbb\xbf{"n": 2}\n{"n": 3}'


def test_the_index_has_the_offset_and_line_of_each_record(write: Callable[..., Path]) -> None:
    offsets, lines = line_index(write("a", LINES))
    assert lines.tolist() == [2, 4, 6, 7, 8]
    assert [LINES[offset:].split(b"\n")[0].strip()[-4:] for offset in offsets] == [
        line.strip()[-4:] for line in LINES.split(b"\n") if line.strip(b" \t\r\n\xef\xbb\xbf")
    ]
    assert line_index(write("b", b""))[0].tolist() == []


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_random_access_gives_what_reading_on_gives(
    block: int, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmft_plugins.sources.BLOCK", block)
    paths = [write("a", LINES), write("b", '{"n": 4}\n'), write("c", '\n{"n": 5}\n{"n": \n\n{"n": 6}\n\n')]
    records = [record.reason[:8] if isinstance(record, BadRecord) else record["n"] for record in load_jsonl(paths)]
    assert records == [0, 1, "not an o", 2, 3, 4, 5, "not JSON", 6]
    for start in range(11):
        assert list(load_jsonl_from(start, paths)) == list(islice(load_jsonl(paths), start, None))


def test_random_access_does_not_parse_what_it_skips_and_keeps_line_numbers(write: Callable[..., Path]) -> None:
    good, bad = load_jsonl_from(1, write("a", 'not json\n\n{"n": 1}\n{"n": \n'))
    assert good == {"n": 1}
    assert (
        isinstance(bad, BadRecord) and "a line 4 column 7: Expecting value (the line starts at byte 19)" in bad.reason
    )
