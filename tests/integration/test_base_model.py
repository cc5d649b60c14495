"""A base model, whose tokenizer has no chat template, is pretrained on documents and asked afterwards."""

import json
from pathlib import Path

import pytest
import torch

from mmft.config import LLM, Data, Dataset, Model, Optim, Prompt, Runtime, TrainConfig, override, use
from mmft.errors import ConfigError, DataError
from mmft.inference import load_assistant
from mmft.plugins import Plugins
from mmft.testing import tiny_llm
from mmft.train.run import train


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Incremental pretraining of a base model with a question for sample chat."""
    llm = tiny_llm(tmp_path / "llm")
    (llm / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((llm / "tokenizer_config.json").read_text("utf-8"))
    (llm / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}), "utf-8")
    (tmp_path / "a.md").write_text("Once upon a time there was a file. " * 9, "utf-8")
    return TrainConfig(
        model=Model(llm=LLM(path=str(llm), trainable=True)),
        data=Data(
            datasets=(Dataset(source=use("text", path=str(tmp_path / "a.md")), data_map="pretrain"),),
            max_length=32, too_long="split", packing=True,
        ),
        optim=Optim(lr=1e-3, max_steps=1),
        runtime=Runtime(
            output_dir=tmp_path / "run", device="cpu", precision="fp32", samples=(Prompt(text="Once upon"),)
        ),
    )  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_a_base_model_learns_documents_and_goes_on_from_a_question(
    config: TrainConfig, plugins: Plugins, streaming: bool
) -> None:
    assert config.data.chat_template == "auto"
    run = config.runtime.output_dir
    assert train(override(config, {"data.streaming": streaming}), plugins) == 0
    (answer,) = json.loads((run / "samples" / "step-0000001.json").read_text("utf-8"))
    assert "error" not in answer
    log = (run / "run.log").read_text("utf-8")
    assert streaming or "tokens a step on average" in log
    with pytest.raises(DataError, match=r"final: .* has no chat_template .*; for chat: --prompt-template NAME"):
        load_assistant(run / "final", plugins, device=torch.device("cpu"))
    assistant = load_assistant(run / "final", plugins, device=torch.device("cpu"), chat_template="vicuna")
    assert assistant.template.name == "vicuna"


def test_a_conversation_for_a_base_model_stops_the_run_with_its_place(
    config: TrainConfig, plugins: Plugins, tmp_path: Path
) -> None:
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"instruction": "Hi", "input": "", "output": "Yes."}) + "\n", "utf-8")
    both = (*config.data.datasets, Dataset(source=use("jsonl", path=str(talk)), data_map="alpaca"))
    with pytest.raises(
        ConfigError, match=r"data.chat_template: .* no chat_template .*\(needed by .*talk.jsonl record 1"
    ):
        train(override(config, {"data.datasets": both}), plugins)
