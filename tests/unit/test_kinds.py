"""What a data map and a data source give is of the kind that their specs name, or the record is dropped with words."""

from types import ModuleType

import pytest

from mmft import hookimpl
from mmft.config import Dataset, use
from mmft.data.formats import format_hint, read_records
from mmft.data.records import iterate_samples
from mmft.data.rewrite import convert
from mmft.errors import DataError
from mmft.plugins import load_plugins
from mmft.specs import DataMap, DatasetSpec
from mmft.types import BadRecord, Conversation, Document, Message, Text, ToolCall


def talk(*messages) -> Conversation:
    return Conversation(messages)


GOOD = talk(Message("user", (Text("q"),)), Message("assistant", (Text("a"),)))
WRONG = {
    "role": (
        talk(Message("human", (Text("q"),))),
        "gave a message with the role 'human'; roles are system, user",
    ),
    "parts": (talk(Message("user", "q")), "gave a message whose parts are a str, expected a tuple of Text and Image"),
    "part": (talk(Message("user", ("q",))), "gave a message with a part that is a str, expected Text or Image"),
    "text": (talk(Message("user", (Text(3),))), "gave a message with a text that is an int, expected a str"),
    "message": (talk({"role": "user"}), "gave a message that is a dict, expected a Message"),
    "messages": (Conversation(iter(GOOD.messages)), "gave messages that are a tuple_iterator, expected a tuple"),
    "call": (talk(Message("assistant", (), ({"name": "x"},))), "gave a tool call that is a dict, expected a ToolCall"),
    "sample": (list(GOOD.messages), "gave a list, expected a Conversation, a Document or None"),
    "document": (Document(None), "gave a document with a text that is a NoneType, expected a str"),
}


def plugins_with(*, fn=lambda record: GOOD, load=lambda path="": [{"q": 1}]):
    module = ModuleType("acme")

    def mmft_data_maps():
        return [DataMap(name="acme_map", fn=fn, columns=("q",))]

    def mmft_datasets():
        return [DatasetSpec(name="acme_source", load=load)]

    module.mmft_data_maps, module.mmft_datasets = hookimpl(mmft_data_maps), hookimpl(mmft_datasets)
    return load_plugins([module])


def samples(plugins):
    return [
        sample for _, _, sample in iterate_samples(Dataset(source=use("acme_source"), data_map="acme_map"), plugins)
    ]


@pytest.mark.parametrize("kind", WRONG)
def test_a_sample_of_another_kind_is_dropped_with_the_map_and_what_is_wrong(kind):
    wrong, told = WRONG[kind]
    (reason,) = samples(plugins_with(fn=lambda record: wrong))
    assert reason.startswith(f"data map 'acme_map' {told}")


def test_samples_of_every_kind_pass(plugins):
    called = talk(*GOOD.messages, Message("assistant", (), (ToolCall("x", {}),)), Message("tool", (Text("1"),)))
    for good in (GOOD, called, Document("x")):
        assert samples(plugins_with(fn=lambda record, good=good: good)) == [good]


def test_a_map_that_gives_another_kind_fits_no_file_and_converts_nothing(tmp_path):
    broken = plugins_with(fn=lambda record: talk(Message("human", (Text("q"),))))
    assert format_hint(DataMap(name="other", fn=dict), [{"q": 1}], broken) == ""
    with pytest.raises(DataError, match=r"record 1: data map 'acme_map' gave a message with the role 'human'"):
        convert(use("acme_source", path="x"), tmp_path / "out.json", broken, to="openai", origin="acme_map")


def test_a_record_that_is_no_mapping_is_a_bad_record_with_the_source():
    def load():
        yield {"q": 1}
        yield ["q", 1]
        yield {"q": 2}

    plugins = plugins_with(load=load)
    reason = "data source 'acme_source' gave a list, expected a mapping of columns or a BadRecord"
    assert samples(plugins) == [GOOD, reason, GOOD]
    assert list(read_records(use("acme_source"), plugins)) == [{"q": 1}, BadRecord(reason), {"q": 2}]


def test_a_source_that_gives_nothing_to_read_is_named():
    with pytest.raises(DataError, match=r"^data source 'acme_source': load gave a NoneType, expected records$"):
        samples(plugins_with(load=lambda: None))
