"""A stream over a source of numbers, and what can be said of its rows."""

import json
from pathlib import Path

from mmft.config import Data, Dataset, use
from mmft.data.feed import Account
from mmft.data.stream import Position, SampleStream, StreamItem
from mmft.data.tokenize import Tokenizer
from mmft.types import PackedSample

WINDOW = 7
COUNTING = """
from mmft import DatasetSpec, hookimpl

READ = []
STARTS = []

def load(number, bad=()):
    return load_from(0, number=number, bad=bad)

def load_from(start, number, bad=()):
    STARTS.append(start)
    for i in range(start, number):
        READ.append(i)
        yield {"id": i} if i in bad else {"id": i, "instruction": f"say {i}", "output": f"n{i} " * (1 + i % 5)}

@hookimpl
def mmft_datasets():
    return [DatasetSpec(name="counting", load=load, load_from=load_from)]
"""


def numbers(number: int, **options) -> Dataset:
    source = {name: options.pop(name) for name in ("bad",) if name in options}
    return Dataset(source=use("counting", number=number, **source), data_map="alpaca", **options)


def data(*datasets: Dataset, **options) -> Data:
    options = {"chat_template": "chatml", "max_length": 96, "streaming": True, "max_bad_fraction": 0.5} | options
    return Data(datasets=datasets, **options)


def opened(config: Data, plugins, tokenizer, start: Position | None = None, *, seed: int = 3) -> SampleStream:
    return SampleStream(config, plugins, tokenizer, seed=seed, start=start, window=WINDOW)


def plain(item: StreamItem) -> tuple:
    """What an item says, comparable."""
    samples = item.sample.samples if isinstance(item.sample, PackedSample) else (item.sample,)
    return [s.input_ids.tolist() for s in samples], item.position, item.news


def texts(items: list[StreamItem], tokenizer: Tokenizer) -> list[str]:
    """What the assistant says in each sample, which tells the record."""
    rows = [i.sample.samples if isinstance(i.sample, PackedSample) else (i.sample,) for i in items]
    return [tokenizer.hf.decode(s.input_ids[s.loss_mask]).split()[0] for row in rows for s in row]


MIXES = {
    "one": [{"number": 20}],
    "several": [{"number": 20}, {"number": 5, "repeat": 2}, {"number": 9}],
    "weighted": [{"number": 20, "weight": 1}, {"number": 4, "weight": 3}],
    "bad": [{"number": 20, "bad": [0, 3, 4, 5, 6, 19]}, {"number": 5}],
    "a whole window bad": [{"number": 40, "bad": list(range(14, 28))}],
}


def mix(name: str) -> list[Dataset]:
    return [numbers(**options) for options in MIXES[name]]


def account(folder: Path, allowed: float = 1.0, **told: int) -> Account:
    begun = Account(folder / "dropped.jsonl", allowed, lambda _: None, **told)
    begun.begin()
    return begun


def listed(folder: Path) -> list[int]:
    return [json.loads(line)["record"] for line in (folder / "dropped.jsonl").read_text("utf-8").splitlines()]
