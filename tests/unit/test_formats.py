"""Which format a record is in, and which source reads a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmft.data.formats import (
    format_hint,
    format_of,
    formats_rows,
    has_column,
    looks_like,
    looks_like_all,
    reader_of,
    source_of,
    suffixes,
)
from mmft.errors import AmbiguousName
from mmft.plugins import Plugins, load_plugins
from mmft.types import BadRecord

PLUGINS = load_plugins()
SAME_COLUMNS = {  # these read the same columns as a plainer format, which comes first
    "agent": "openai", "messages": "openai", "code_alpaca": "prompt_completion", "crime_kg": "default",
    "medical": "alpaca", "law_reference": "qa", "tiny_codes": "prompt_response",
    "wizardlm": "sharegpt", "llava_image_only": "llava",
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


# which source reads a file


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.json", "json"), ("a.JSONL", "jsonl"), ("a.ndjson", "jsonl"), ("a.csv", "csv"), ("a.tab", "tsv"),
        ("a.pq", "parquet"), ("a.b.md", "text"), ("a.tar", "webdataset"), ("a.tar.gz", "webdataset"), ("a.gz", None),
        ("json", None),
    ],
)  # fmt: skip
def test_a_file_is_read_by_the_source_that_claims_its_suffix(name: str, source: str | None, plugins: Plugins) -> None:
    assert reader_of(Path(name), plugins) == source


def test_suffixes_are_in_lower_case_with_the_dot(plugins: Plugins) -> None:
    assert {"", "."}.isdisjoint(suffixes(plugins))
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in suffixes(plugins))


ACME = """
from mmft import DatasetSpec, hookimpl

def load(path):
    return [{"query": "a", "response": "b"}]

@hookimpl
def mmft_datasets():
    return [DatasetSpec(name=NAME, load=load, suffixes=(SUFFIX,))]
"""


@pytest.fixture
def acme(install: Callable[..., Path]) -> Callable[[str, str], Plugins]:
    """All plugins, and one that offers a source of this name for this suffix."""

    def offer(name: str, suffix: str) -> Plugins:
        code = ACME.replace("NAME", repr(name)).replace("SUFFIX", repr(suffix))
        install("acme-mmft", "1", {"acme": "acme_mod"}, acme_mod=code)
        return load_plugins()

    return offer


def test_a_source_of_a_plugin_is_found_by_its_suffix(acme: Callable[[str, str], Plugins]) -> None:
    offered = acme("table", ".xyz")
    assert reader_of(Path("a.xyz"), offered) == "table" and ".xyz" in suffixes(offered)
    assert format_of(Path("a.xyz"), offered)[0][0].name == "query_response"


def test_of_two_suffixes_that_fit_the_longer_one_decides(acme: Callable[[str, str], Plugins]) -> None:
    assert reader_of(Path("a.chat.json"), acme("chat", ".chat.json")) == "chat"


def test_a_source_whose_name_two_plugins_offer_is_found_by_its_qualified_name(
    acme: Callable[[str, str], Plugins],
) -> None:
    offered = acme("csv", ".psv")
    assert reader_of(Path("a.psv"), offered) == "acme/csv" and reader_of(Path("a.csv"), offered) == "tables/csv"
    assert source_of(Path("a.psv"), offered).suffixes == (".psv",)


def test_a_suffix_that_two_sources_claim_is_an_error_that_names_both(acme: Callable[[str, str], Plugins]) -> None:
    with pytest.raises(AmbiguousName, match=r"files '\.csv' are read by 2 data sources; .*: acme/table, tables/csv"):
        source_of(Path("a.csv"), acme("table", ".csv"))


def test_a_record_that_cannot_be_read_does_not_hide_the_format(plugins: Plugins) -> None:
    records = [BadRecord("a.jsonl line 1: not JSON"), {"query": "a", "response": "b"}]
    assert looks_like_all(records, plugins)[0][0].name == "query_response"
    assert format_hint(plugins.data_maps.get("sql"), records, plugins) == (
        "this looks like `query_response`: it has query, response"
    )
