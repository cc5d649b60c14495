"""The parity gate's own rules: what is asked, what is said of what was not, and results that cannot be asked here."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmft.cli.convert import say
from mmft.config import LLM, Model, Vision, use
from mmft.convert.parity import LeftOut, Report, ask_source, compare, unverified, write_report
from mmft.convert.probes import probes
from mmft.convert.results import OurResult
from mmft.convert.verify import verify
from mmft.data.shape import describe_model
from mmft.errors import CheckpointError, DataError, ModelError
from mmft.inference import Assistant
from mmft.modeling.build import build_model
from mmft.testing import tiny_llm
from mmft.types import Conversation

CPU = torch.device("cpu")
UNASKED = ["two turns", "a system text", "a picture, then text"]  # more than one message


class Source:
    """A model of two tokens that takes the conversations `takes` says."""

    def __init__(self, takes):
        self.takes = takes

    def inputs(self, conversation):
        if not self.takes(conversation):
            raise DataError("the template takes no such thing\nand a second line")
        return [1], torch.zeros(1) if conversation.images else None

    def greedy(self, conversation, max_new_tokens):
        return [0]

    def logits(self, conversation, tokens):
        return torch.tensor([[1.0, 0.0], [1.0, 0.0]])


class Decoder:
    """A tokenizer as `compare` needs it."""

    class hf:
        decode = staticmethod(lambda ids, **_: str(ids))


def single(conversation: Conversation) -> bool:
    return len(conversation.messages) == 1


def test_probes_that_were_not_asked_are_in_the_report_with_the_reason():
    source = Source(single)
    with probes(pictures=True) as asked:
        answers = ask_source(source, asked)
        report = compare(answers, source, Decoder, dtype=torch.float32, tolerance=1e-4)
    assert [one.name for one in answers if isinstance(one, LeftOut)] == UNASKED
    assert report.verified
    assert report.left_out == dict.fromkeys(UNASKED, "the template takes no such thing")
    assert len(report.outcomes) == 8


def test_the_probe_set_has_every_kind_of_text_and_pictures_of_every_shape():
    with probes(pictures=True) as asked:
        sizes = {name: [Image.open(one.source).size for one in talk.images] for name, talk in asked if talk.images}
        talks = [talk for _, talk in asked]
    assert any(talk.messages[0].role == "system" for talk in talks)
    assert any(len(talk.messages) > 2 for talk in talks) and any(not talk.messages[0].text.isascii() for talk in talks)
    assert max(len(talk.messages[0].text) for talk in talks) > 250
    drawn = [size for several in sizes.values() for size in several]
    assert {"wide", "tall", "square"} == {shape(*size) for size in drawn}
    assert len(set(drawn)) == len(drawn) == 5
    assert len({shape(*size) for size in sizes["two pictures"]}) == 2


def shape(width: int, height: int) -> str:
    return "square" if width == height else "wide" if width > height else "tall"


def test_a_probe_beyond_the_models_positions_is_left_out_with_both_numbers(plugins, tmp_path):
    folder = short_llm(tmp_path)
    model = Model(llm=LLM(path=str(folder)))
    shape_of = describe_model(model, plugins)
    built = build_model(model, plugins, info=None, image_id=None, dtype=torch.float32, device=CPU)
    template = plugins.chat_templates.get("chatml")
    source = OurResult(Assistant(built.eval(), shape_of, template))
    with probes(pictures=False) as asked:
        answers = ask_source(source, asked)
    (left,) = [one for one in answers if isinstance(one, LeftOut)]
    assert left.name == "a long text"
    assert re.fullmatch(r"it takes \d{3,} tokens, and the model has positions for 128", left.reason)


def short_llm(folder: Path) -> Path:
    """A tiny model with positions for 128 tokens."""
    path = tiny_llm(folder / "llm")
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}), "utf-8")
    return path


@pytest.mark.parametrize("pictures", [True, False])
def test_nothing_passes_without_a_question_and_no_model_that_sees_without_a_picture(pictures):
    kind = " with a picture" if pictures else ""
    source = Source((lambda conversation: not conversation.images) if pictures else (lambda _: False))
    with (
        probes(pictures=pictures) as asked,
        pytest.raises(ModelError, match=rf"no probe{kind} could be asked.*takes no such thing; train with"),
    ):
        ask_source(source, asked)


def test_a_result_that_cannot_be_run_here_says_so_and_how_to_verify_it(tmp_path, capsys):
    report = unverified(tmp_path, tmp_path / "out", "vllm is not installed", "mmft convert verify {out} RUN")
    say(report, tmp_path / "out")
    told = f"not verified: vllm is not installed; to verify it: mmft convert verify {tmp_path / 'out'} RUN"
    assert told in capsys.readouterr().out
    content = json.loads((tmp_path / "parity.json").read_text("utf-8"))
    assert (content["verified"], content["outcomes"], content["note"]) == (False, [], "vllm is not installed")
    assert content["command"] == f"mmft convert verify {tmp_path / 'out'} RUN"


def test_numbers_that_hold_are_not_replaced_by_others_that_do_not(tmp_path):
    good, bad = Report(True, "float32", 1e-4, ()), Report(False, "float32", 1e-4, (), "the logits differ")
    assert write_report(bad, tmp_path, "one")
    assert write_report(good, tmp_path)
    assert not write_report(bad, tmp_path, "another")
    content = json.loads((tmp_path / "parity.json").read_text("utf-8"))
    assert (content["verified"], content["source"]) == (True, "one")


def written(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content, "utf-8")
    return folder


def test_a_model_is_not_verified_against_itself_nor_a_run_as_a_result(tmp_path, plugins):
    run = written(tmp_path / "run" / "final", mmft="{}")
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(CheckpointError, match="is the model itself; give what `mmft convert` made of it"):
        verify(tmp_path / "run" / ".." / "run" / "final", run, plugins, device=CPU)
    with pytest.raises(CheckpointError, match="is what training left"):
        verify(run, tmp_path / "other", plugins, device=CPU)
    assert not (run / "parity.json").exists()


def test_a_config_that_is_no_json_is_one_line(tmp_path, plugins):
    for content in ("{", "3"):
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read: ") as caught:
            verify(written(tmp_path / "out", config=content), tmp_path / "run", plugins, device=CPU)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sees", [True, False])
def test_a_text_result_is_not_asked_about_pictures_nor_one_that_sees_about_none(
    sees, tmp_path, plugins, tiny_llm_path, tiny_clip_path
):
    see = Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("mlp2x_gelu")) if sees else None
    model = Model(llm=LLM(path=str(tiny_llm_path)), vision=see).model_dump(mode="json")
    content = {"model": model, "chat_template": "auto", "precision": "fp32", "plugins": {}, "files": {}}
    run = written(tmp_path / "run", mmft=json.dumps(content))
    out = written(tmp_path / "out", config="{}", **({} if sees else {"preprocessor_config": "{}"}))
    with pytest.raises(CheckpointError, match=r"sees pictures and \S+ does not: \S+out was not made of \S+run"):
        verify(out, run, plugins, device=CPU)


def test_what_no_conversion_wrote_is_not_verified(tmp_path, plugins):
    with pytest.raises(CheckpointError, match=r"holds no config.json and no mmft.json; give what `mmft convert`"):
        verify(tmp_path, tmp_path / "run", plugins, device=CPU)
