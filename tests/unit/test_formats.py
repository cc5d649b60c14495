"""Which format a record is in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from mmft.cli import cli
from mmft.config import Data, Dataset, use
from mmft.data.collate import Collator
from mmft.data.dataset import format_hints
from mmft.data.feed import Account, StreamFeed
from mmft.data.files import source_name
from mmft.data.formats import (
    added_text,
    format_hint,
    format_of,
    formats_rows,
    has_column,
    looks_like,
    looks_like_all,
    reader_of,
    source_of,
    source_use,
    suffixes,
)
from mmft.data.store import Drop
from mmft.data.stream import SampleStream
from mmft.data.tokenize import Tokenizer
from mmft.errors import AmbiguousName, DataError
from mmft.plugins import Plugins, load_plugins
from mmft.types import BadRecord, Conversation

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
        ("a.jsonl", '{"x": 1}\n', "in no known format (keys of the first record: 'x')"),
        ("a.xyz", "", "no data source reads '.xyz'; allowed: .csv, .json, .jsonl"),
        ("README", "", "no data source reads 'README'; allowed: .csv"),
    ],
)
def test_a_file_in_no_known_format_is_one_clear_line(name: str, text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(text, "utf-8")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(file)])
    assert isinstance(result.exception, DataError) and error in str(result.exception)


# which map comes first


ROW = {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"}
TALK = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
PICTURED = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]


def best(records: list[Any], plugins: Plugins) -> str:
    return looks_like_all(records, plugins)[0][0].name


def test_a_row_with_nothing_to_train_is_no_reason_against_the_map_that_knows_so(plugins: Plugins) -> None:
    assert best([{**ROW, "output": "<nooutput>"}, *[ROW] * 30], plugins) == "alpaca"


def test_a_map_that_keeps_more_of_the_text_wins_over_one_that_reads_one_record_more(plugins: Plugins) -> None:
    assert best([{"input": "a", "output": "b"}, *[ROW] * 19], plugins) == "alpaca"


def test_pictures_that_come_late_are_found(plugins: Plugins) -> None:
    mixed = [{"conversations": TALK}] * 1000 + [{"image": "1.png", "conversations": PICTURED}] * 1000
    assert best(mixed, plugins) == "llava"
    empty = [{"image": None, "conversations": TALK}] * 1000 + [{"image": "1.png", "conversations": PICTURED}]
    assert best(empty, plugins) == "llava"


def test_one_odd_record_decides_nothing(plugins: Plugins) -> None:
    odd = {"image": "1.png", "conversations": PICTURED}
    assert best([*[ROW] * 40, odd], plugins) == "alpaca"


@pytest.mark.parametrize(
    ("record", "neutral"),
    [
        ({"question": "q", "answer": "a"}, "qa"),
        ({"prompt": "q", "response": "a"}, "prompt_response"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"input": "q", "output": "a"}, "default"),
    ],
)
def test_columns_that_many_have_are_read_without_a_text_of_the_map(record: Any, neutral: str, plugins: Plugins) -> None:
    assert best([record], plugins) == neutral
    data_map = plugins.data_maps.get(neutral)
    sample = data_map.fn(record)
    assert isinstance(sample, Conversation) and added_text(data_map, [record]) == ""
    assert [(one.role, one.text) for one in sample.messages] == [("user", "q"), ("assistant", "a")]


def test_what_a_map_adds_is_said(plugins: Plugins, tmp_path: Path) -> None:
    record = {"context": "CREATE TABLE t (a INT)", "question": "q", "answer": "a"}
    assert best([record], plugins) == "sql"
    assert "SQL" in added_text(plugins.data_maps.get("sql"), [record])
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n", "utf-8")
    for command in (["formats", "--file"], ["check", "--out", str(tmp_path / "out")]):
        said = CliRunner().invoke(cli, ["data", *command, str(tmp_path / "a.jsonl")]).output
        assert "adds the system text" in said and "SQL" in said


# folders, globs and options of a source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for name in ("a.jsonl", "deep/b.jsonl"):
        (tmp_path / name).write_text('{"query": "a", "response": "b"}\n', "utf-8")
    (tmp_path / "1.png").touch()
    return tmp_path


@pytest.mark.parametrize("inside", ["", "*.jsonl", "**/*.jsonl"])
def test_a_folder_and_a_glob_are_in_a_format_as_a_file_is(inside: str, folder: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(folder / inside)])
    assert result.exit_code == 0 and "query_response: it has query, response" in result.output


def test_files_of_several_sources_are_an_error_that_counts_them(folder: Path, plugins: Plugins) -> None:
    (folder / "README.md").touch()
    with pytest.raises(AmbiguousName, match=r"several data sources: jsonl \(2\), text \(1\); name one with --source"):
        source_use(folder, plugins)
    assert source_use(folder, plugins, "jsonl").options == {"path": str(folder)}


def test_an_option_the_source_does_not_have_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query;response\na;b\n", "utf-8")
    options = ("--source-option", "delimter=;")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(tmp_path / "a.csv"), *options])
    assert isinstance(result.exception, DataError) and "options: delimiter, rename" in str(result.exception)
    options = ("--source-option", "delimiter=;")
    result = CliRunner().invoke(cli, ["data", "formats", "--file", str(tmp_path / "a.csv"), *options])
    assert "query_response" in result.output
    with pytest.raises(DataError, match=r'one column, .query;response.*delimiter=";"'):
        format_of(tmp_path / "a.csv", load_plugins())


def test_a_name_beside_a_file_is_refused(folder: Path) -> None:
    result = CliRunner().invoke(cli, ["data", "formats", "llava", "--file", str(folder / "a.jsonl")])
    assert result.exit_code == 2 and "give llava or --file, not both" in result.output


# files that are not what their name says


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("a.json", b"\xff\xfe" + '[{"a": 1}]'.encode("utf-16-le"), "iconv -f UTF-16 -t UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
        ("c.jsonl", b'[{"a": 1}, {"a": 2}]', "--source json"),
        ("c.json", b'{"a": 1}\n{"a": 2}\n', "is 'jsonl'"),
    ],
)
def test_the_remedy_fits_the_file(name: str, content: bytes, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=remedy):
        format_of(tmp_path / name, load_plugins())


# the hint in a streaming run and of a later dataset


def two_datasets(tmp_path: Path) -> Data:
    right, wrong = tmp_path / "right.jsonl", tmp_path / "wrong.jsonl"
    right.write_text(json.dumps(ROW) + "\n", "utf-8")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    wrong.write_text((json.dumps({"messages": turns}) + "\n") * 9, "utf-8")
    datasets = tuple(Dataset(source=use("jsonl", path=str(file)), data_map="alpaca") for file in (right, wrong))
    return Data(datasets=datasets, chat_template="chatml", max_length=64)


def test_the_hint_names_the_dataset_whose_map_is_wrong(tmp_path: Path, plugins: Plugins) -> None:
    data = two_datasets(tmp_path)
    drops = [Drop(source_name(dataset), 1, "", "bad") for dataset in data.datasets]
    assert format_hints(data, plugins, drops) == ("data.datasets.1: this looks like `openai`: it has messages[].role",)
    assert format_hints(data, plugins, drops[:1]) == ()


@pytest.mark.parametrize("which", [slice(None), slice(1, None)])
def test_a_stream_that_stops_says_which_map_would_fit(
    which: slice, tmp_path: Path, plugins: Plugins, tiny_llm_path: Path
) -> None:
    data = two_datasets(tmp_path)
    data = data.model_copy(update={"datasets": data.datasets[which]})
    tokenizer = Tokenizer.for_model(AutoTokenizer.from_pretrained(tiny_llm_path))
    feed = StreamFeed(
        SampleStream(data, plugins, tokenizer, seed=0), Account(tmp_path / "d.jsonl", data.max_bad_fraction, print)
    )
    with pytest.raises(DataError, match="this looks like `openai`"):
        for batch in feed.loader(Collator("flat"), batch_size=1, rank=0, world=1, pin_memory=False):
            feed.take(dict(batch))  # type: ignore[call-overload]
