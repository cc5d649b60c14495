"""A number that is not finite, or a part that learns nothing, ends the run with what a person needs to know."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, override, use
from mmft.data.collate import Collator
from mmft.data.dataset import prepare
from mmft.data.shape import describe_model
from mmft.errors import TrainingError
from mmft.modeling.build import build_model
from mmft.modeling.llava import LlavaModel
from mmft.train.guard import SEARCH_STEPS, FirstGradients, Guard, rows_of, teaches_pictures
from mmft.train.run import train


@pytest.fixture
def setting(tmp_path: Path, tiny_llm_path: Path, tiny_clip_path: Path) -> TrainConfig:
    """Six records; the even ones have a picture."""
    Image.new("RGB", (30, 30), "red").save(tmp_path / "red.png")
    records = []
    for i in range(6):
        image = {"image": "red.png"} if i % 2 == 0 else {}
        question = "<image>\nWhat?" if image else "Say it"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"number {i}"}]
        records.append({"conversations": turns, **image})
    (tmp_path / "data.json").write_text(json.dumps(records), "utf-8")
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(tiny_llm_path), lora=Lora(r=4, alpha=8)),
            vision=Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("mlp2x_gelu")),
        ),
        data=Data(
            datasets=(
                Dataset(source=use("json", path=str(tmp_path / "data.json")), data_map="llava", image_folder=tmp_path),
            ),
            chat_template="chatml",
            max_length=128,
        ),
        optim=Optim(lr=1e-2, max_steps=6, batch_size_per_device=2),
        runtime=Runtime(output_dir=tmp_path / "run", device="cpu", precision="fp32", save_steps=1, logging_steps=1),
    )


@pytest.fixture
def parts(setting, plugins, tmp_path):
    """(model, batches of one sample each: 0, 2, 4 with a picture)."""
    shape = describe_model(setting.model, plugins)
    model = build_model(
        setting.model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    store = prepare(setting.data, plugins, shape.tokenizer, tmp_path / ".cache")
    collate = Collator(model.layout, transform=shape.vision.transform, tells_origins=True)
    return model, [collate([sample]) for sample in store]


def step(guard: Guard, model, batches, number: int = 3) -> None:
    """Forward, backward and check, as the trainer does it."""
    guard.begin(batches)
    model.train()
    for batch in batches:
        loss = model(**{key: value for key, value in batch.items() if isinstance(value, torch.Tensor)})["loss"]
        loss.backward()
        guard.saw(loss)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    guard.check(norm, number, forward=model)


def test_a_loss_that_is_not_finite_names_step_records_and_the_first_module(parts, tmp_path):
    model, batches = parts
    broken = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.down_proj"))
    with torch.no_grad():
        broken.base_layer.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError) as caught:
        step(Guard(model, tmp_path), model, batches[:2])
    told = str(caught.value)
    assert told.startswith("step 3: the loss is nan; first in the output of llm."), told
    assert "layers.1.mlp.down_proj" in told
    assert "its own weight weight is not finite" in told
    assert f"{tmp_path}/data.json record 1;" in told  # of the first failing micro-batch, not of both
    assert "there is no checkpoint before it" in told
    assert "\n" not in told


def test_before_any_update_the_remedy_is_no_lower_rate_and_the_plugin_of_the_part_is_named(parts, tmp_path):
    model, batches = parts
    model.projector.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(TrainingError) as caught:
        step(Guard(model, tmp_path), model, batches[:1], number=1)
    told = str(caught.value)
    assert "of projector 'mlp2x_gelu' of plugin 'llava' from mmft" in told
    assert "no weight has been updated yet, so no lower optim.lr helps; look at these records" in told
    with pytest.raises(TrainingError, match=r"look at these records, lower optim\.lr or optim\.max_grad_norm"):
        step(Guard(model, tmp_path), model, batches[:1], number=2)


def test_gradients_that_are_not_finite_are_traced_behind_a_finite_loss(parts, tmp_path):
    model, batches = parts
    root_of_zero = lambda module, inputs, output: output + (output * 0).abs().sqrt()  # noqa: E731  # 0 forward, nan back
    model.projector.register_forward_hook(root_of_zero)
    found = r"the gradient norm is nan; first in the gradient that reaches the output of projector\.\w+ .*record 1;"
    with pytest.raises(TrainingError, match=found):
        step(Guard(model, tmp_path), model, [batches[0], batches[1]])


def test_an_overflow_while_the_loss_scaler_searches_is_no_error_until_it_never_ends(parts, tmp_path):
    model, batches = parts
    guard = Guard(model, tmp_path, scaled=True)
    guard.begin(batches[:1])
    for _ in range(SEARCH_STEPS):
        guard.losses = [torch.tensor(2.0)]
        guard.check(torch.tensor(torch.inf), 1)
    with pytest.raises(TrainingError, match="for the 41th step in a row"):
        guard.check(torch.tensor(torch.inf), 41)
    with pytest.raises(TrainingError, match="gradient norm is inf"):
        unscaled = Guard(model, tmp_path)
        unscaled.begin(batches[:1])
        unscaled.check(torch.tensor(torch.inf), 1)


def test_a_part_that_is_cut_off_is_named_in_the_first_step_that_concerns_it(parts, tmp_path):
    model, batches = parts
    model.projector.register_forward_hook(lambda module, inputs, output: output.detach())
    guard = Guard(model, tmp_path)
    model.zero_grad()
    with pytest.raises(TrainingError, match="step 1: projector is to be trained and got no gradient at all"):
        step(guard, model, batches[:1], 1)


def test_a_text_only_first_step_and_the_zeros_of_a_new_adapter_are_normal(parts, tmp_path):
    model, batches = parts
    guard = Guard(model, tmp_path)
    step(guard, model, [batches[1]], 1)
    assert set(guard.first_gradients.touched) == {"projector"}  # waits for a picture; the adapter's A is all zeros
    model.zero_grad()
    step(guard, model, [batches[0]], 2)
    assert not guard.first_gradients.touched


def test_only_zeros_are_an_error_too(parts, tmp_path):
    model, batches = parts
    model.projector.register_forward_hook(lambda module, inputs, output: output * 0.0)
    with pytest.raises(TrainingError, match="projector is to be trained and got only zeros as gradients"):
        step(Guard(model, tmp_path), model, batches[:1], 1)


def test_a_gradient_that_an_engine_keeps_elsewhere_counts(parts):
    """DeepSpeed takes `.grad` away before the optimizer steps; the hooks have seen it pass."""
    model, batches = parts
    first = FirstGradients(model)
    model.train()
    model(**{key: value for key, value in batches[0].items() if isinstance(value, torch.Tensor)})["loss"].backward()
    for parameter in model.parameters():
        parameter.grad = None
    first.check(1, batches[:1])
    assert not first.touched


def test_a_picture_after_the_last_target_teaches_nothing():
    ids, labels = torch.tensor([[5, 6, 9, 9, 7, 8]]), torch.tensor([[-100, 6, -100, -100, -100, -100]])
    positions = torch.arange(6)[None]
    assert not teaches_pictures({"input_ids": ids, "labels": labels, "position_ids": positions}, 9)
    assert teaches_pictures(
        {"input_ids": ids, "labels": torch.where(ids == 8, 8, labels), "position_ids": positions}, 9
    )
    next_sample = {"input_ids": ids, "labels": torch.where(ids == 8, 8, labels),
                   "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1]])}  # fmt: skip
    assert not teaches_pictures(next_sample, 9)


def test_rows_are_listed_by_source_and_cut_short():
    batch = {"origins": [*(("a.json", n, 5) for n in range(1, 12)), ("b.json", 1200, 3)]}
    assert rows_of([batch]) == "a.json records 1, 2, 3, 4, 5, 6, 7, 8 and 3 more, b.json record 1,200"


def test_a_run_whose_rate_is_far_too_high_ends_with_one_line_and_its_last_finite_checkpoint(setting, plugins, tmp_path):
    """Warm-up makes the rate of step 1 zero; step 2 ruins the weights and step 3 finds out."""
    config = override(setting, {"optim.lr": 1e37, "runtime.save_total_limit": 5})
    with pytest.raises(TrainingError) as caught:
        train(config, plugins)
    told, run = str(caught.value), tmp_path / "run"
    assert "step 3: the loss is" in told
    assert "data.json record" in told
    assert f"the last checkpoint with finite weights is {run / 'checkpoint-2'};" in told
    path = run / "checkpoint-2" / "projector.safetensors"
    save_file({name: tensor * torch.inf for name, tensor in load_file(path).items()}, path)
    assert f"is {run / 'checkpoint-1'};" in Guard(LlavaModel(torch.nn.Linear(1, 1)), run)._advice(7)
