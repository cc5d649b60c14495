"""The `json` and `jsonl` sources."""

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft.types import BadRecord
from mmft_plugins import _files
from mmft_plugins._json_stream import JsonReader
from mmft_plugins.sources import json_files, jsonl_files, load_json, load_jsonl

RECORDS = [{"text": "ä"}, {"text": "你好"}]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_json_reads_a_list_of_objects(write: Callable[..., Path]) -> None:
    assert list(load_json(write("a.json", json.dumps(RECORDS)))) == RECORDS


def test_json_reads_an_object_holding_one_list_of_objects(write: Callable[..., Path]) -> None:
    content = {"version": 1, "tags": ["a", "b"], "data": RECORDS}
    assert list(load_json(write("a.json", json.dumps(content)))) == RECORDS


@pytest.mark.parametrize("content", [{"a": RECORDS, "b": RECORDS}, {"a": 1}, {"a": [1, 2]}])
def test_json_refuses_an_object_with_none_or_several_lists_and_names_its_keys(
    content: dict[str, Any], write: Callable[..., Path]
) -> None:
    path = write("a.json", json.dumps(content))
    with pytest.raises(DataError, match=f"a.json: an object with [02] lists of objects .keys: '{next(iter(content))}'"):
        list(load_json(path))


@pytest.mark.parametrize(("content", "kind"), [("3", "a number"), ('"x"', "a string"), ("null", "null")])
def test_json_refuses_what_is_neither_list_nor_object(content: str, kind: str, write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=f"a.json: {kind}; allowed: a list of objects"):
        list(load_json(write("a.json", content)))


def test_json_names_line_and_column_of_a_syntax_error_and_the_other_format(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"a.json: not JSON at line 2 column 1: .*'jsonl'"):
        list(load_json(write("a.json", '{"a": 1}\n{"a": 2}\n')))


@pytest.mark.parametrize(("value", "kind"), [(3, "a number"), ("x", "a string"), (None, "null"), ([1], "a list")])
def test_an_item_that_is_no_object_is_a_bad_record_and_the_rest_is_read(
    value: Any, kind: str, write: Callable[..., Path]
) -> None:
    first, bad, last = load_json(write("a.json", json.dumps([RECORDS[0], value, RECORDS[1]])))
    assert [first, last] == RECORDS
    assert bad == BadRecord(f"not an object: a.json record 2 is {kind}, found {value!r}; a record is an object {{...}}")


def test_jsonl_reads_an_object_a_line_and_skips_blank_lines(write: Callable[..., Path]) -> None:
    lines = f"\n{json.dumps(RECORDS[0])}\r\n   \n{json.dumps(RECORDS[1], ensure_ascii=False)}"
    assert list(load_jsonl(write("a.jsonl", lines))) == RECORDS


def test_jsonl_keeps_a_unicode_line_separator_inside_a_string(write: Callable[..., Path]) -> None:
    assert list(load_jsonl(write("a.jsonl", '{"text": "a\u2028b\x85"}\n'))) == [{"text": "a\u2028b\x85"}]


@pytest.mark.parametrize(("load", "content"), [(load_json, '[{"a": 1}]'), (load_jsonl, '{"a": 1}\n')])
def test_a_byte_order_mark_is_accepted(load: Callable[..., Any], content: str, write: Callable[..., Path]) -> None:
    assert list(load(write("a", b"\xef\xbb\xbf" + content.encode()))) == [{"a": 1}]


def test_bytes_that_are_not_utf8_are_named(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"a line 1: not UTF-8 at byte 7"):
        list(load_json(write("a", b'{"a": "\xff"}')))


def test_nesting_without_end_is_a_data_error(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="a: record 1: nested too deeply to be read; flatten it"):
        list(load_json(write("a", "[" * 200_000)))


@pytest.mark.parametrize("load", [load_json, load_jsonl])
def test_a_missing_file_is_named(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        list(load(tmp_path / "nowhere"))


def test_several_files_are_read_in_the_order_given(write: Callable[..., Path]) -> None:
    paths = [write("b.jsonl", '{"n": 1}\n'), str(write("a.jsonl", '{"n": 2}\n'))]
    assert [record["n"] for record in load_jsonl(paths)] == [1, 2]
    assert jsonl_files(paths) == [Path(path) for path in paths]


def test_files_takes_one_path_and_refuses_none() -> None:
    assert json_files("a.json") == [Path("a.json")]
    with pytest.raises(DataError, match="an empty list; give at least one file"):
        json_files([])


def test_a_folder_gives_its_files_of_the_format_sorted_and_nothing_hidden(write: Callable[..., Path]) -> None:
    folder = write("b.jsonl", "").parent
    for name in ("sub", ".cache"):
        (folder / name).mkdir()
    for name in ("a.JSONL", "sub/c.jsonl", "d.json", ".cache/e.jsonl", ".f.jsonl"):
        (folder / name).touch()
    assert [str(file.relative_to(folder)) for file in jsonl_files(folder)] == ["a.JSONL", "b.jsonl", "sub/c.jsonl"]


def test_a_glob_gives_its_files_sorted_in_place(write: Callable[..., Path]) -> None:
    files = [write(name, "") for name in ("z.jsonl", "p2.jsonl", "p1.jsonl", "p10.jsonl")]
    folder = files[0].parent
    names = [file.name for file in jsonl_files([files[0], str(folder / "p*.jsonl")])]
    assert names == ["z.jsonl", "p1.jsonl", "p10.jsonl", "p2.jsonl"]


def test_a_name_that_only_looks_like_a_glob_is_a_file(write: Callable[..., Path]) -> None:
    file = write("a[1].jsonl", '{"n": 1}\n')
    assert list(load_jsonl(file)) == [{"n": 1}]


def test_a_pattern_or_folder_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches .*x\*\.json"):
        json_files(tmp_path / "x*.json")
    with pytest.raises(DataError, match=r"the folder .* holds no file that ends in \.jsonl or \.ndjson"):
        jsonl_files(tmp_path)


def test_a_remote_address_is_refused() -> None:
    with pytest.raises(DataError, match=r"https://host/a.json is a remote address; .*download it first"):
        json_files("https://host/a.json")


@pytest.mark.parametrize("load", [load_json, load_jsonl])
def test_an_empty_file_is_an_error(load: Callable[..., Any], write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="a: the file is empty; allowed: "):
        list(load(write("a", " \n\n")))


WHOLE = '[{"text": "first"}, {"n": [-1.5e+2, true, NaN], "t": "s\\u0041", "u": null}]'


@pytest.mark.parametrize("cut", range(1, len(WHOLE)))
def test_a_json_file_that_ends_too_early_is_said_to_be_cut_off(cut: int, write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"a.json: not JSON at column \d+: .*the file ends inside record \d.* cut off"):
        list(load_json(write("a.json", WHOLE[:cut])))


NOT_JSON = [
    ('[{"a": 1} {"a": 2}]', "column 11"),
    ('{"a" 1}', "column 6"),
    ('[{"a": 1},\n {"a" 1},\n {"a": 3}]', "line 2 column 7"),
    ('[{"a": 1}, {"a": oops}]', "column 18"),
    ('[{"a": 1}, {"a": "b",}]', "column 2[12]"),  # of the comma, or behind it: as the version of Python says
]


@pytest.mark.parametrize("after", ["", " " * 40])
@pytest.mark.parametrize(("content", "place"), NOT_JSON)
def test_what_is_not_json_is_not_said_to_be_cut_off(
    content: str, place: str, after: str, write: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match=rf"a.json: not JSON at {place}: [^;]*; mend the file there"):
        list(load_json(write("a.json", content + after)))


def test_a_syntax_error_is_found_at_its_line_and_not_taken_for_the_end(write: Callable[..., Path]) -> None:
    records = load_json(write("a.json", '[\n {"a": 1},\n {"a" 2},\n' + '{"a": 3},' * 400_000))
    assert next(records) == {"a": 1}
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a.json: not JSON at line 3 column 7: Expecting ':'"):
        next(records)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_a_latin_1_byte_is_named_with_line_byte_and_remedy(write: Callable[..., Path]) -> None:
    content = b"\xef\xbb\xbf" + '[{"a": "ä"},\n'.encode() + b'{"a": "caf\xe9"}]'
    with pytest.raises(DataError, match=r"a.json line 2: not UTF-8 at byte 27: .*found 0xe9.*iconv"):
        list(load_json(write("a.json", content)))
    assert content[27] == 0xE9
    _, bad = load_jsonl(write("a.jsonl", b'{"a": "\xc3\xa4 "}\n' + b'{"a": "caf\xe9"}\n'))
    assert isinstance(bad, BadRecord) and bad.reason.endswith(
        "line 2 at byte 10 of the line, 23 of the file: invalid continuation byte (found 0xe9); "
        "save the file as UTF-8, for example with iconv -f LATIN1 -t UTF-8"
    )


def test_crlf_and_byte_order_mark_change_nothing(write: Callable[..., Path]) -> None:
    content = "\ufeff" + json.dumps(RECORDS, indent=1, ensure_ascii=False).replace("\n", "\r\n")
    assert list(load_json(write("a.json", content))) == RECORDS
    with pytest.raises(DataError, match="line 2 column 3"):
        list(load_json(write("b.json", "\ufeff[\r\n  oops]")))


STRANGE = [{"text": "\0 nul"}, {"text": "\ud800 alone"}, {"text": "x" * 2_000_000}, {"text": "\u2028"}]


@pytest.mark.parametrize(
    ("load", "join"), [(load_json, json.dumps), (load_jsonl, lambda r: "\n".join(map(json.dumps, r)))]
)
def test_nul_lone_surrogate_and_two_megabytes_are_passed_on(load: Any, join: Any, write: Callable[..., Path]) -> None:
    assert list(load(write("a", join(STRANGE)))) == STRANGE


@pytest.mark.parametrize("load", [load_json, load_jsonl])
def test_numbers_and_keys_are_read_as_python_writes_and_reads_them(
    load: Callable[..., Any], write: Callable[..., Path]
) -> None:
    text = '{"nan": NaN, "inf": -Infinity, "id": 18446744073709551616, "big": 1e400, "n": 1, "n": 0.1}'
    (record,) = load(write("a", f"[{text}]" if load is load_json else text))
    assert math.isnan(record.pop("nan"))
    assert record == {"inf": -math.inf, "id": 2**64, "big": math.inf, "n": 0.1}  # of a key that stands twice the last


def test_json_takes_the_list_that_field_names(write: Callable[..., Path]) -> None:
    path = write("a.json", json.dumps({"train": RECORDS, "x": {"y": [1]}, "test": [{"t": 1}]}))
    assert list(load_json(path, field="test")) == [{"t": 1}]
    with pytest.raises(DataError, match=r"2 lists of objects .*choose one with the option field='train'"):
        list(load_json(path))
    with pytest.raises(DataError, match="0 lists of objects under 'tset'"):
        list(load_json(path, field="tset"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RECORD = st.dictionaries(st.text(), JSON, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORD, max_size=6), st.integers(1, 7), st.sampled_from([None, 1]), st.booleans())
def test_any_list_is_read_alike_in_blocks_of_any_size(records: Any, size: int, indent: Any, ascii: bool) -> None:
    text = json.dumps(records, indent=indent, ensure_ascii=ascii)
    reader = JsonReader(Path("a"), (text[i : i + size] for i in range(0, len(text), size)))
    assert reader.peek() == "["
    assert [record for _, record in reader.items("")] == records
    reader.end()


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORD, min_size=1, max_size=4), st.integers(1, 9), st.data())
def test_an_error_is_at_the_place_json_loads_finds_it(records: Any, size: int, data: Any) -> None:
    text = json.dumps(records, indent=1)
    at = data.draw(st.integers(1, len(text) - 1))
    broken = text[:at] + "\x01" + text[at:]
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(broken)
    reader = JsonReader(Path("a"), (broken[i : i + size] for i in range(0, len(broken), size)))
    with pytest.raises(DataError) as found:
        reader.peek()
        list(reader.items(""))
        reader.end()
    line, column = expected.value.lineno, expected.value.colno
    place = f"line {line} column {column}" if line > 1 else f"column {column}"
    assert f"not JSON at {place}: " in str(found.value)


@pytest.mark.parametrize("load", [load_json, load_jsonl])
def test_memory_does_not_grow_with_the_file(load: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "a"
    line = json.dumps({"text": "word " * 200}) + "\n"
    with path.open("w") as file:
        file.write(line * 30_000 if load is load_jsonl else "[" + f"{line}," * 30_000 + line + "]")
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    for _ in load(path):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6


def test_text_is_decoded_alike_in_blocks_of_any_size(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a", "\ufeffä你\n\ufeff😀".encode())
    for size in (4, 5, 6, 100):
        monkeypatch.setattr(_files, "BLOCK", size)
        assert "".join(_files.text_blocks(path)) == "ä你\n\ufeff😀"
    with pytest.raises(DataError, match="line 2: not UTF-8 at byte 5: unexpected end of data"):
        list(_files.text_blocks(write("b", b"\xc3\xa4\n12\xe4\xbd")))


def test_both_formats_are_offered_with_the_files_they_read() -> None:
    datasets = load_plugins().datasets
    for name, load in (("json", load_json), ("jsonl", load_jsonl)):
        spec = datasets.get(name)
        assert spec.load is load and spec.files is not None and spec.files(path="x") == [Path("x")]
