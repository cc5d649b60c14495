"""The loss is the token mean of the optimizer step, however the step is cut; and 4-bit training survives evaluation."""

import json

import pytest
import torch

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.data.collate import Collator
from mmft.data.dataset import prepare
from mmft.data.shape import describe_model
from mmft.modeling.build import build_model
from mmft.modeling.llm import quantized_layers
from mmft.train.run import train


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight records with 1 to 8 words of answer."""
    path = tmp_path_factory.mktemp("eight") / "r.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "one " * n}]}
        for n in range(1, 9)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_for(llm, eight, folder, **optim):
    return TrainConfig(
        model=Model(llm=LLM(path=str(llm), trainable=True)),
        data=Data(datasets=(Dataset(source=use("jsonl", path=eight), data_map="messages"),), max_length=128),
        optim=Optim(lr=1e-3, epochs=1, warmup_ratio=0.0, **optim),
        runtime=Runtime(output_dir=folder, logging_steps=1, device="cpu"),
    )


def test_accumulation_changes_neither_loss_nor_gradient_norm(tiny_llm_path, eight, tmp_path, plugins):
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 samples: one optimizer step over the same eight, whose answers differ in length."""
    seen = {}
    for accumulate in (1, 2, 4, 8):
        folder = tmp_path / str(accumulate)
        config = config_for(tiny_llm_path, eight, folder, batch_size_per_device=8 // accumulate, accumulate=accumulate)
        assert train(config, plugins) == 0
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(lines) == 1
        seen[accumulate] = (lines[0]["loss"], lines[0]["grad_norm"])
    for accumulate in (2, 4, 8):
        assert seen[accumulate] == pytest.approx(seen[1], rel=1e-5), seen


def test_packed_rows_give_the_gradients_of_separate_samples(tiny_llm_path, eight, tmp_path, plugins):
    config = config_for(tiny_llm_path, eight, tmp_path)
    shape = describe_model(config.model, plugins)
    store = prepare(config.data, plugins, shape.tokenizer, tmp_path / "cache")
    model = build_model(
        config.model, plugins, info=None, image_id=None, dtype=torch.float32, device=torch.device("cpu")
    )
    samples = [store[i] for i in range(len(store))]
    tokens = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    gradients = []
    for rows in ([samples], [[sample] for sample in samples]):
        model.zero_grad()
        for row in rows:
            model(**Collator("flat")(row), num_items_in_batch=tokens)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    # float32 sums in another order: the worst of 44,192 gradients differs by 1.8e-7 where the norm of all is 4.0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def four_bit(plugins, llm):
    config = Model(llm=LLM(path=str(llm), quantization="nf4", lora=Lora(r=4, alpha=8, dropout=0.0)))
    torch.manual_seed(0)
    return build_model(config, plugins, info=None, image_id=None, dtype=torch.bfloat16, device=torch.device("cpu"))


def lora_gradients(model):
    ids = torch.arange(4, 20)[None]
    model.train()
    model.zero_grad()
    model(ids, labels=ids, position_ids=torch.arange(16)[None])["loss"].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def evaluate(model):
    model.eval()
    ids = torch.arange(4, 20)[None]
    model(ids, position_ids=torch.arange(16)[None])
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_training_after_an_evaluation_has_the_gradients_of_a_model_never_evaluated(plugins, tiny_llm_path):
    """bitsandbytes 0.50.2 on AVX512-BF16 CPUs: without the guard every gradient below is exactly 0 after evaluation."""
    fresh, evaluated = four_bit(plugins, tiny_llm_path), four_bit(plugins, tiny_llm_path)
    evaluate(evaluated)
    expected, got = lora_gradients(fresh), lora_gradients(evaluated)
    assert any(g.abs().max() > 0 for g in expected.values())
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_the_guard_is_on_every_4_bit_layer_that_has_the_switch(plugins, tiny_llm_path):
    layers = quantized_layers(four_bit(plugins, tiny_llm_path))
    assert len(layers) == 14
    assert not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in layers)


def test_a_text_only_batch_gives_the_projector_a_gradient_of_zero(plugins, tiny_llm_path, tiny_clip_path):
    config = Model(
        llm=LLM(path=str(tiny_llm_path)),
        vision=Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("mlp2x_gelu")),
    )
    shape = describe_model(config, plugins)
    model = build_model(
        config, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=torch.float32,
        device=torch.device("cpu"),
    ).train()  # fmt: skip
    ids = torch.arange(4, 12)[None]
    model(ids, labels=ids, position_ids=torch.arange(8)[None])["loss"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.projector.parameters())
    assert all(p.grad is None for p in model.vision.parameters())
