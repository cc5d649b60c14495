"""The parity gate's own rules: what is asked, what is said of what was not, and results that cannot be asked here."""

import json

import pytest
import torch

from mmft.cli.convert import say
from mmft.convert.parity import LeftOut, ask_source, compare, probes, unverified
from mmft.convert.verify import verify
from mmft.errors import CheckpointError, DataError, ModelError
from mmft.types import Conversation


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
    assert [one.name for one in answers if isinstance(one, LeftOut)] == ["two turns", "a picture, then text"]
    assert report.verified
    assert report.left_out == dict.fromkeys(("two turns", "a picture, then text"), "the template takes no such thing")
    assert len(report.outcomes) == 7


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


def test_what_no_conversion_wrote_is_not_verified(tmp_path, plugins):
    with pytest.raises(CheckpointError, match=r"holds no config.json and no mmft.json; give what `mmft convert`"):
        verify(tmp_path, tmp_path, plugins, device=torch.device("cpu"))
