"""mmft data repeat, replace and convert: nothing is lost, and a failure leaves every file as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mmft.cli import cli
from mmft.errors import DataError

ALPACA = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "d", "output": "é\ud800"}]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["data", *map(str, arguments)])


def write(file: Path, records: list[Any]) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    file.write_text(lines if file.suffix == ".jsonl" else json.dumps(records), "utf-8")
    return file


def read(file: Path) -> list[Any]:
    text = file.read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)  # type: ignore[no-any-return]


@pytest.mark.parametrize("source", ["in.json", "in.jsonl"])
@pytest.mark.parametrize("target", ["out.json", "out.jsonl"])
def test_repeat_writes_the_whole_file_n_times(source: str, target: str, tmp_path: Path) -> None:
    result = run("repeat", write(tmp_path / source, ALPACA), tmp_path / target, "-n", "3")
    assert result.exit_code == 0 and "6 records" in result.output
    assert read(tmp_path / target) == ALPACA * 3


def test_repeat_writes_200_by_default_and_takes_the_place_of_its_input_when_told(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"a": 1}])
    assert isinstance(run("repeat", file, file).exception, DataError)
    assert run("repeat", file, file, "--overwrite").exit_code == 0
    assert len(read(file)) == 200


def test_a_failure_leaves_the_target_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", write(tmp_path / "out.jsonl", [{"old": 1}])
    source.write_text('{"a": 1}\n{"a": ', "utf-8")
    result = run("repeat", source, target, "-n", "2", "--overwrite")
    assert isinstance(result.exception, DataError) and "line 2" in str(result.exception)
    assert read(target) == [{"old": 1}] and len(list(tmp_path.iterdir())) == 2


def test_replace_goes_through_folders_and_every_string_but_no_key(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    first = write(tmp_path / "a.json", [{"old": "an old old", "n": 1, "list": ["old", {"k": "no"}]}])
    second = write(tmp_path / "deep" / "er" / "b.jsonl", [{"k": "x"}, {"k": "\u00e9 old"}])
    (tmp_path / "c.txt").write_text("old", "utf-8")
    result = run("replace", tmp_path, "--old", "old", "--new", "new")
    assert "replaced 4 in 2 of 2 files" in result.output
    assert read(first) == [{"old": "an new new", "n": 1, "list": ["new", {"k": "no"}]}]
    assert read(second) == [{"k": "x"}, {"k": "é new"}]
    assert (tmp_path / "c.txt").read_text("utf-8") == "old"


def test_replace_in_keys_too_where_asked(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"old": "old"}])
    run("replace", file, "--old", "old", "--new", "new", "--in-keys")
    assert read(file) == [{"new": "new"}]
    write(file, [{"old": 1, "new": 2}])
    result = run("replace", file, "--old", "old", "--new", "new", "--in-keys")
    assert "makes two keys equal" in str(result.exception) and read(file) == [{"old": 1, "new": 2}]


def test_replace_finds_text_that_the_file_writes_with_escapes(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": "\\u56fe\\/1"}\n', "utf-8")
    run("replace", file, "--old", "图/", "--new", "img/")
    assert read(file) == [{"a": "img/1"}]


def test_lines_without_the_text_stay_byte_for_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a":1.0e2}\r\n\r\n{"a":"old"}\r\n{"b":2}')
    run("replace", file, "--old", "old", "--new", "new")
    assert file.read_bytes() == b'{"a":1.0e2}\r\n\r\n{"a":"new"}\r\n{"b":2}'


def test_replace_keeps_the_indentation_and_does_not_write_what_it_does_not_change(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[\n    {\n        "a": "old"\n    }\n]\n', "utf-8")
    run("replace", file, "--old", "old", "--new", "new")
    assert file.read_text("utf-8") == '[\n    {\n        "a": "new"\n    }\n]\n'
    before = file.stat().st_mtime_ns
    assert "replaced 0 in 0 of 1 files" in run("replace", file, "--old", "old", "--new", "x").output
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "arguments", "error"),
    [
        (b'{"a": "old"}\n{"a": "old', ("--old", "old"), "a.jsonl line 2: not JSON"),
        (b'{"a": "\xe9 old"}\n', ("--old", "old"), "a.jsonl line 1: not UTF-8 at byte 7"),
        (b"{}", ("--old", ""), "--old is empty"),
    ],
)
def test_replace_says_what_is_wrong_and_changes_nothing(
    text: bytes, arguments: tuple[str, ...], error: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(text)
    result = run("replace", file, *arguments, "--new", "n")
    assert isinstance(result.exception, DataError) and error in str(result.exception)
    assert file.read_bytes() == text and len(list(tmp_path.iterdir())) == 1


def test_replace_refuses_a_path_that_is_not_there_or_no_json(tmp_path: Path) -> None:
    assert "no such file or folder" in str(run("replace", tmp_path / "x", "--old", "a", "--new", "b").exception)
    (tmp_path / "a.txt").touch()
    assert "allowed: .json, .jsonl" in str(run("replace", tmp_path / "a.txt", "--old", "a", "--new", "b").exception)


def test_convert_finds_the_format_and_lists_what_it_drops(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", [*ALPACA, {"instruction": "e", "input": "", "output": ""}, {"x": 1}])
    result = run("convert", source, tmp_path / "b.jsonl", "--to", "messages", "--max-bad-fraction", "0.5")
    assert result.exit_code == 0, result.exception
    assert "2 records from alpaca to messages; dropped 2:" in result.output
    assert "record 3: nothing to train" in result.output and "record 4: 'instruction' is missing" in result.output
    assert [[one["content"] for one in record["messages"]] for record in read(tmp_path / "b.jsonl")] == [
        ["a", "b"], ["c\nd", "é\ud800"],
    ]  # fmt: skip


def test_convert_goes_there_and_back(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a <image>"}, {"from": "gpt", "value": "b"}]
    source = write(tmp_path / "a.json", [{"image": "1.jpg", "conversations": turns}])
    for number, name in enumerate(["messages", "sharegpt", "query_response", "llava"]):
        target = tmp_path / f"{number}.json"
        assert run("convert", source, target, "--to", name).exit_code == 0
        source = target
    assert read(source) == [{"image": "1.jpg", "conversations": turns}]


@pytest.mark.parametrize(
    ("record", "arguments", "error"),
    [
        ({"text": "a"}, ("--to", "alpaca"), "nothing to write as 'alpaca'; record 1: 'alpaca' has no place for a doc"),
        ({"x": 1}, ("--to", "alpaca"), "in no known format (keys of the first record: 'x')"),
        ({"text": "a"}, ("--to", "sql"), "--to sql: this format is only read; formats that are written: agent, alpaca"),
        ({"text": "a"}, ("--from", "alpaca", "--to", "messages"), "record 1: 'instruction' is missing"),
    ],
)
def test_convert_writes_no_file_where_nothing_can_be_written(
    record: Any, arguments: tuple[str, ...], error: str, tmp_path: Path
) -> None:
    result = run("convert", write(tmp_path / "a.json", [record]), tmp_path / "b.json", *arguments)
    assert isinstance(result.exception, DataError) and error in str(result.exception)
    assert not (tmp_path / "b.json").exists()


def test_convert_writes_nothing_where_too_much_would_be_lost(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", [*ALPACA, {"x": 1}])
    target = write(tmp_path / "b.json", [{"old": 1}])
    result = run("convert", source, target, "--to", "messages", "--overwrite")
    assert isinstance(result.exception, DataError) and read(target) == [{"old": 1}]
    assert "1 of 3 records (33.3%) cannot be converted from 'alpaca' to 'messages'; at most 1.0%" in str(
        result.exception
    )
    assert "is not written. The first: record 3: 'instruction' is missing" in str(result.exception)


def test_convert_reads_a_folder_and_says_what_the_map_adds(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.json", "b.json"):
        write(tmp_path / "in" / name, [{"prompt": "a", "response": "b"}])
    result = run("convert", tmp_path / "in", tmp_path / "c.json", "--from", "tiny_codes", "--to", "messages")
    assert result.exit_code == 0 and "tiny_codes adds the system text" in result.output
    assert len(read(tmp_path / "c.json")) == 2
    result = run("convert", tmp_path / "in", tmp_path / "d.json", "--to", "messages")
    assert "from prompt_response to messages" in result.output and "adds" not in result.output
