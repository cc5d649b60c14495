"""Nothing of a step is kept: a run may be as long as it likes."""

import gc
import json
from types import ModuleType

import torch
from transformers import TrainerCallback

from mmft import hookimpl
from mmft.config import LLM, Data, Dataset, Evaluation, Model, Optim, Prompt, Runtime, TrainConfig, use
from mmft.plugins import load_plugins
from mmft.train.run import train


def live_tensors() -> tuple[int, int]:
    """How many tensors Python can reach, and the bytes behind them."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return len(found), sum(storages.values())


def test_no_tensor_of_a_step_a_save_an_evaluation_or_a_sample_is_left_behind(tmp_path, tiny_llm_path):
    turns = [
        [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": "word " * (i % 9 + 1)}] for i in range(64)
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turn} for turn in turns]), "utf-8")
    seen: dict[int, tuple[int, int]] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step in (6, 26):  # the optimizer has its state, and each thing was done once
                seen[state.global_step] = live_tensors()

    module = ModuleType("watch")
    module.mmft_callbacks = hookimpl(lambda config: [Watch()])
    config = TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path), trainable=True)),
        data=Data(
            datasets=(Dataset(source=use("json", path=str(tmp_path / "a.json")), data_map="llava"),),
            chat_template="chatml", max_length=128, validation_share=0.1,
        ),
        optim=Optim(lr=1e-3, max_steps=28, batch_size_per_device=2),
        runtime=Runtime(
            output_dir=tmp_path / "run", device="cpu", precision="fp32", save_steps=5, logging_steps=1,
            evaluation=Evaluation(steps=5), samples=(Prompt(text="Say 1"),), sample_steps=5,
        ),
    )  # fmt: skip
    assert train(config, load_plugins([module])) == 0
    (few, small), (many, large) = seen[6], seen[26]
    # the batch at hand is as long as it is; a tensor kept a step would be 20 more
    assert large <= small * 1.02, seen
    assert many <= few + 5, seen
