"""Which format a record is in."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mmft.cli import cli
from mmft.data.formats import format_hint, formats_rows, has_column, looks_like, looks_like_all
from mmft.errors import DataError
from mmft.plugins import Plugins, load_plugins

PLUGINS = load_plugins()
SAME_COLUMNS = {  # these read the same columns as a plainer format, which comes first
    "agent": "openai", "messages": "openai", "code_alpaca": "prompt_completion", "crime_kg": "default",
    "medical": "alpaca", "wizardlm": "sharegpt", "llava_image_only": "llava",
}  # fmt: skip
EXAMPLES = [(one.name, example) for one in PLUGINS.data_maps for example in one.examples]


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_the_examples_of_each_format_are_recognised(name: str, example: Any) -> None:
    if name == "caption" and "conversations" in example:
        name = "llava"  # LLaVA-Pretrain is in LLaVA's format; to read it as captions is a choice
    names = [data_map.name for data_map, _ in looks_like(example, PLUGINS)]
    assert names[0] == SAME_COLUMNS.get(name, name) and name in names


def test_the_reason_names_the_columns(plugins: Plugins) -> None:
    (best, reason), *_ = looks_like({"messages": [{"role": "user", "content": "a"}]}, plugins)
    assert (best.name, reason) == ("openai", "it has messages[].role")


@pytest.mark.parametrize(
    ("record", "path", "there"),
    [
        ({"a": None}, "a", True),
        ({}, "a", False),
        ({"a": {"b": 1}}, "a.b", True),
        ({"a": "b"}, "a.b", False),
        ({"a": [{"b": 1}, {"b": 2}]}, "a[].b", True),
        ({"a": [{"b": 1}, {}]}, "a[].b", False),
        ({"a": []}, "a[].b", False),
        ({"a": [1]}, "a[]", True),
        ([], "a", False),
    ],
)
def test_a_column_is_a_path_and_brackets_mean_each_item(record: Any, path: str, there: bool) -> None:
    assert has_column(record, path) is there


def test_a_file_of_records_with_and_without_images_is_llava(plugins: Plugins) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert (
        looks_like_all([{"conversations": turns}, {"conversations": turns, "image": "1"}], plugins)[0][0].name
        == "llava"
    )


def test_a_wrong_choice_is_answered_with_the_format_that_fits(plugins: Plugins) -> None:
    records = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert format_hint(plugins.data_maps.get("alpaca"), records, plugins) == (
        "this looks like `openai`: it has messages[].role"
    )
    assert format_hint(plugins.data_maps.get("messages"), records, plugins) == ""
    assert format_hint(plugins.data_maps.get("alpaca"), [{"x": 1}], plugins) == ""


def test_the_table_has_every_format_with_columns_and_summary(plugins: Plugins) -> None:
    rows = formats_rows(plugins)
    assert [name for name, _, _ in rows] == plugins.data_maps.names()
    assert all(columns and summary for _, columns, summary in rows)


# mmft data formats


def test_formats_lists_them_all_and_shows_one(plugins: Plugins) -> None:
    listed = CliRunner().invoke(cli, ["data", "formats"]).output
    assert all(name in listed for name in plugins.data_maps.names()) and "messages[].role" in listed
    shown = CliRunner().invoke(cli, ["data", "formats", "alpaca"]).output
    assert json.loads(shown[shown.index("{") :]) == plugins.data_maps.get("alpaca").examples[0]


@pytest.mark.parametrize(
    ("suffix", "text"), [("json", '[{"query": "a", "response": "b"}]'), ("csv", "query,response\na,b\n")]
)
def test_formats_says_which_format_a_file_is_in(suffix: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / f"data.{suffix}"
    file.write_text(text, "utf-8")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(file)])
    assert result.exit_code == 0 and "query_response: it has query, response" in result.output


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.jsonl", '{"x": 1}\n', "in no known format; keys of the first record: 'x'"),
        ("a.txt", "", "a file of type '.txt'; allowed: .json, .jsonl"),
    ],
)
def test_a_file_in_no_known_format_is_one_clear_line(name: str, text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, "utf-8")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(file)])
    assert isinstance(result.exception, DataError) and error in str(result.exception)
