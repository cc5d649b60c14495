"""What the data commands say of a config: its mistakes first, then numbers a person can choose `max_length` by."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mmft import hookimpl
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, use
from mmft.data.check import _bad_share, bars, check_config_data
from mmft.data.check_report import CheckReport
from mmft.data.headers import ImageReport
from mmft.data.inspect import Choice, Views
from mmft.data.proof import refuse_difference
from mmft.data.records import bound_template
from mmft.data.shape import describe_model
from mmft.data.store import Origins, TokenStore
from mmft.data.stream import SampleStream
from mmft.data.tokenize import document_segments
from mmft.errors import ConfigError
from mmft.inference import user_message
from mmft.plugins import Plugins, load_plugins
from mmft.specs import DataMap
from mmft.testing import tiny_llm
from mmft.types import Conversation, Document, Message, PackedSample, RawRecord, Sample, Text

MakeConfig = Callable[..., TrainConfig]


def talk(answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": answer}]}


def read_either(record: RawRecord) -> Sample:
    """A document, or a conversation with an answer."""
    if "text" in record:
        return Document(record["text"])
    return Conversation((Message("user", (Text("What?"),)), Message("assistant", (Text(record["answer"]),))))


def a_map_of_both() -> ModuleType:
    """A plugin with a data map of documents and conversations."""
    module = ModuleType("both")

    @hookimpl
    def mmft_data_maps() -> list[DataMap]:
        return [DataMap(name="mixed_map", fn=read_either, examples=({"text": "x"},))]

    module.mmft_data_maps = mmft_data_maps  # type: ignore[attr-defined]
    return module


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture
def make(tmp_path: Path, tiny_llm_path: Path) -> MakeConfig:
    """`make(datasets, **data)`: the config of a text model."""

    def make(*datasets: Dataset, llm: Path = tiny_llm_path, optim: Optim | None = None, **data: Any) -> TrainConfig:
        options = {"chat_template": "chatml", "max_length": 64, "max_bad_fraction": 1.0, **data}
        return TrainConfig(
            model=Model(llm=LLM(path=str(llm))), data=Data(datasets=datasets, **options),
            optim=optim or Optim(lr=1e-3), runtime=Runtime(output_dir=tmp_path / "runs" / "tiny"),
        )  # fmt: skip

    return make


def of(path: Path, data_map: str = "llava", **options: Any) -> Dataset:
    return Dataset(source=use("jsonl", path=str(path)), data_map=data_map, **options)


def checked(config: TrainConfig, plugins: Plugins) -> CheckReport:
    with bars() as progress:
        return check_config_data(config, plugins, progress)


def fact(report: CheckReport, label: str) -> str:
    return dict(report.facts)[label]


@pytest.mark.parametrize("look", [checked, Views], ids=["data check", "data show"])
def test_a_wrong_config_is_told_before_any_record_is_read(
    tmp_path: Path, make: MakeConfig, plugins: Plugins, look: Callable[[TrainConfig, Plugins], Any]
) -> None:
    path = str(write(tmp_path / "a.jsonl", [talk("Yes.")]))
    wrong = Dataset(source=use("jsonl", path=path, foo=1), data_map="lava")
    none = Dataset(source=use("csvv", path=path), data_map="llava", repeat=2, weight=1.0)
    with pytest.raises(ConfigError) as caught:
        look(make(wrong, none), plugins)
    said = [str(problem) for problem in caught.value.problems]
    for start in (
        "data.datasets.0.source: data source 'jsonl': got an unexpected keyword argument 'foo'; options: path",
        "data.datasets.0.data_map: no data map named 'lava'",
        "data.datasets.1.source: no data source named 'csvv'",
        "data.datasets: data.datasets.0 has no weight, others have one",
        "data.datasets.1.repeat: 2 times and a weight exclude each other",
    ):
        assert any(one.startswith(start) for one in said), (start, said)


def test_data_can_be_checked_before_what_only_training_needs_is_there(
    tmp_path: Path, make: MakeConfig, plugins: Plugins
) -> None:
    config = make(of(write(tmp_path / "a.jsonl", [talk("Yes.")])), streaming=True)
    assert config.optim.max_steps is None and checked(config, plugins).exit_code == 0


@pytest.fixture(scope="session")
def base_llm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: its tokenizer has no chat template."""
    path = tiny_llm(tmp_path_factory.mktemp("base") / "llm")
    (path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    settings.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return path


NEEDS_ONE = r"data.chat_template: chat template 'auto': the tokenizer has no chat_template .*needed by \S+ record 2"


def test_documents_need_no_chat_template(
    tmp_path: Path, make: MakeConfig, plugins: Plugins, base_llm_path: Path
) -> None:
    books = of(write(tmp_path / "a.jsonl", [{"text": "A book."}] * 3), "pretrain")
    config = make(books, llm=base_llm_path, chat_template="auto", packing=True)
    report = checked(config, plugins)
    assert report.exit_code == 0 and fact(report, "template").startswith("auto: this model has none")
    views = Views(config, plugins)
    assert "A book." in views.tokenizer.hf.decode(next(views.samples(Choice(1))).samples[0].input_ids)
    assert len(next(views.packed(1)).samples) == 3
    stream = SampleStream(config.data, plugins, views.tokenizer, seed=0)
    assert isinstance(next(iter(stream)).sample, PackedSample)
    refuse_difference(bound_template("auto", plugins, views.tokenizer), views.tokenizer, config.data)


def test_the_first_conversation_is_named_where_there_is_no_chat_template(
    tmp_path: Path, make: MakeConfig, plugins: Plugins, base_llm_path: Path
) -> None:
    mixed = of(write(tmp_path / "a.jsonl", [{"text": "x"}, {"answer": "Yes."}]), "mixed_map")
    plugins = load_plugins([a_map_of_both()])
    config = make(mixed, llm=base_llm_path, chat_template="auto")
    with pytest.raises(ConfigError, match=NEEDS_ONE):
        checked(config, plugins)
    with pytest.raises(ConfigError, match=NEEDS_ONE):
        next(iter(SampleStream(config.data, plugins, Views(config, plugins).tokenizer, seed=0)))
    with pytest.raises(ConfigError, match=r"data.chat_template: chat template 'auto': the tokenizer has no"):
        list(Views(config, plugins).samples(Choice(2)))


def test_sample_chat_of_a_base_model_goes_on_from_the_question(plugins: Plugins, base_llm_path: Path) -> None:
    tokenizer = describe_model(Model(llm=LLM(path=str(base_llm_path))), plugins).tokenizer
    template = pickle.loads(pickle.dumps(bound_template("auto", plugins, tokenizer)))
    prompt = template.render(Conversation((user_message("Once upon"),)), generation_prompt=True)
    document = document_segments(Document("Once upon"), tokenizer)
    assert [s.content for s in document][: len(prompt)] == [s.content for s in prompt]
    assert not template.stop


def long_text(words: int) -> dict[str, Any]:
    return {"text": "word " * words}


def test_pieces_of_one_record_are_no_duplicates_and_equal_records_in_pieces_are(
    tmp_path: Path, make: MakeConfig, plugins: Plugins
) -> None:
    records = [{"text": "a a " * 300}, {"text": "b b " * 100}, {"text": "b b " * 100}, {"text": "b b"}]
    config = make(of(write(tmp_path / "a.jsonl", records), "pretrain"), max_length=16, too_long="split")
    report = checked(config, plugins)
    assert fact(report, "duplicates").startswith("1 (25.0%); most often, 2 times: ")
    assert "record 2: b b" in fact(report, "duplicates")
    assert re.fullmatch(r"4 in 1 dataset\(s\), 4 kept as [\d,]+ samples", fact(report, "records"))


@pytest.mark.parametrize("too_long", ["drop", "truncate", "split", "error"])
def test_lengths_are_those_of_the_records_before_anything_is_done_to_long_ones(
    tmp_path: Path, make: MakeConfig, plugins: Plugins, too_long: str
) -> None:
    dataset = of(write(tmp_path / "a.jsonl", [long_text(5), long_text(200), long_text(300)]), "pretrain")
    whole = checked(make(dataset, max_length=100_000), plugins)
    report = checked(make(dataset, max_length=32, too_long=too_long), plugins)
    assert report.lengths == whole.lengths and report.lengths
    assert sum(count for _, _, count in report.lengths.bars) == 3 and "before" in report.lengths.unit
    longest = report.lengths.quantiles["max"]
    said = fact(report, "longer than 32")
    assert said.startswith("2 (66.7%) of the records") and said.endswith(f"the longest has {longest:,} tokens")
    assert fact(whole, "longer than 100,000") == "0 (0.0%) of the records"


def test_the_first_token_of_a_document_is_no_target(tmp_path: Path, make: MakeConfig, plugins: Plugins) -> None:
    report = checked(make(of(write(tmp_path / "a.jsonl", [{"text": "abc"}] * 2), "pretrain")), plugins)
    total, trained = map(int, re.findall(r"(\d+) kept, trained (\d+)", fact(report, "tokens"))[0])
    assert trained == total - 2


def test_an_image_that_cannot_be_read_costs_one_record_however_many_pieces_it_has() -> None:
    ids, images = np.zeros(9, np.int32), [["bad.png"], ["bad.png"], []]
    origins = Origins(("a.json",), np.array([0, 3]), np.array([1, 1, 2]))
    store = TokenStore(ids, ids > 0, np.array([0, 3, 6, 9]), images, np.arange(3), (), 2, origins=origins)
    assert store.first_of_record.tolist() == [0, 2]
    config = Data(datasets=(Dataset(source=use("json", path="a.json"), data_map="llava"),), max_length=8)
    said = _bad_share(store, config, ImageReport(1, {"bad.png": "is empty"}))
    assert said == ["1 of 2 records (50.0%) cannot be trained; at most 1.0% is allowed (data.max_bad_fraction)"]


def test_the_tokens_of_a_step_are_told(tmp_path: Path, make: MakeConfig, plugins: Plugins) -> None:
    dataset = of(write(tmp_path / "a.jsonl", [{"text": "abc"}] * 8), "pretrain")
    optim = Optim(lr=1e-3, batch_size_per_device=2, accumulate=2)
    report = checked(make(dataset, optim=optim), plugins)
    total = int(fact(report, "tokens").split(" ")[0])
    assert fact(report, "a step").startswith(f"batches of 2 x 2: {total // 2} tokens a step on average")
    packed = checked(make(dataset, optim=optim, packing=True), plugins)
    assert "full" in fact(packed, "packing") and f"{total} tokens a step" in fact(packed, "a step")


def test_a_text_file_that_is_not_trained_is_named(tmp_path: Path, make: MakeConfig, plugins: Plugins) -> None:
    books = tmp_path / "books"
    books.mkdir()
    for name, text in {"a.md": "A book.", "empty.md": "", "z.md": "Another."}.items():
        (books / name).write_text(text, "utf-8")
    config = make(Dataset(source=use("text", path=str(books)), data_map="pretrain"))
    (drop,) = checked(config, plugins).drops
    assert drop.id == str(books / "empty.md")
    assert str(drop).startswith(f"{books} record 2 ({books / 'empty.md'}): nothing to train")
    one = make(Dataset(source=use("text", path=str(books / "empty.md")), data_map="pretrain"))
    assert str(checked(one, plugins).drops[0]).startswith(f"{books / 'empty.md'} record 1: nothing to train")
