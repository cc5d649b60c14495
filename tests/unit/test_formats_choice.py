"""Of several formats that could read a record, which one is proposed, and when a run says so."""

import json
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
    looks_like_all,
)
from mmft.data.store import Drop
from mmft.data.stream import SampleStream
from mmft.data.tokenize import Tokenizer
from mmft.errors import DataError
from mmft.plugins import Plugins
from mmft.types import Conversation

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
