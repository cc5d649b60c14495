"""The `json` and `jsonl` sources."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft_plugins.sources import files, load_json, load_jsonl

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
def test_json_names_the_number_of_a_record_that_is_no_object(value: Any, kind: str, write: Callable[..., Path]) -> None:
    records = load_json(write("a.json", json.dumps([*RECORDS, value])))
    assert [next(records), next(records)] == RECORDS
    with pytest.raises(DataError, match=f"a.json record 3: {kind}, found"):
        next(records)


def test_jsonl_reads_an_object_a_line_and_skips_blank_lines(write: Callable[..., Path]) -> None:
    lines = f"\n{json.dumps(RECORDS[0])}\r\n   \n{json.dumps(RECORDS[1], ensure_ascii=False)}"
    assert list(load_jsonl(write("a.jsonl", lines))) == RECORDS


def test_jsonl_keeps_a_unicode_line_separator_inside_a_string(write: Callable[..., Path]) -> None:
    assert list(load_jsonl(write("a.jsonl", '{"text": "a\u2028b\x85"}\n'))) == [{"text": "a\u2028b\x85"}]


def test_jsonl_names_the_line_that_is_not_json(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"a.jsonl line 3: not JSON at column 7: .*'json'"):
        list(load_jsonl(write("a.jsonl", '{"a": 1}\n\n{"a": }\n')))


def test_jsonl_names_the_line_that_is_no_object(write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl line 2: a list, found"):
        list(load_jsonl(write("a.jsonl", '{"a": 1}\n[1]\n')))


@pytest.mark.parametrize(("load", "content"), [(load_json, '[{"a": 1}]'), (load_jsonl, '{"a": 1}\n')])
def test_a_byte_order_mark_is_accepted(load: Callable[..., Any], content: str, write: Callable[..., Path]) -> None:
    assert list(load(write("a", b"\xef\xbb\xbf" + content.encode()))) == [{"a": 1}]


@pytest.mark.parametrize("load", [load_json, load_jsonl])
def test_bytes_that_are_not_utf8_are_named(load: Callable[..., Any], write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"a( line 1)?: not UTF-8 at byte 7"):
        list(load(write("a", b'{"a": "\xff"}')))


@pytest.mark.parametrize("load", [load_json, load_jsonl])
def test_nesting_without_end_is_a_data_error(load: Callable[..., Any], write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="nested too deeply"):
        list(load(write("a", "[" * 200_000)))


@pytest.mark.parametrize("load", [load_json, load_jsonl])
def test_a_missing_file_is_named(load: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: cannot be read: No such file"):
        list(load(tmp_path / "nowhere"))


def test_several_files_are_read_in_the_order_given(write: Callable[..., Path]) -> None:
    paths = [write("b.jsonl", '{"n": 1}\n'), str(write("a.jsonl", '{"n": 2}\n'))]
    assert [record["n"] for record in load_jsonl(paths)] == [1, 2]
    assert files(paths) == [Path(path) for path in paths]


def test_files_takes_one_path_and_refuses_none() -> None:
    assert files("a.json") == [Path("a.json")]
    with pytest.raises(DataError, match="an empty list; give at least one file"):
        files([])


def test_both_formats_are_offered_with_the_files_they_read() -> None:
    datasets = load_plugins().datasets
    for name, load in (("json", load_json), ("jsonl", load_jsonl)):
        spec = datasets.get(name)
        assert spec.load is load and spec.files is not None and spec.files(path="x") == [Path("x")]
