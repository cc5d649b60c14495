"""Ways to train: each takes real steps here, and moves what it was asked to move and nothing else."""

import itertools

import numpy as np
import pytest
import torch

from mmft.config import LLM, Lora, Model, Optim, Vision, use
from mmft.data.shape import describe_model
from mmft.errors import ModelError
from mmft.modeling.build import build_model
from mmft.modeling.llm import quantized_layers
from mmft.testing import tiny_vision
from mmft.train.trainer import parameter_groups, schedule_options
from mmft.types import IGNORE_INDEX

ADAPTER = Lora(r=4, alpha=8, dropout=0.0)
DORA = Lora(r=4, alpha=8, dropout=0.0, dora=True, rslora=True)


def chosen(llm, encoder=None, *, kind="clip", **parts) -> Model:
    vision = {"encoder": use(kind, path=str(encoder)), "projector": use("mlp2x_gelu"), **parts.pop("vision", {})}
    return Model(llm=LLM(path=str(llm), **parts), vision=Vision(**vision) if encoder else None)


def built(model, plugins, *, seed=0, dtype=torch.float32, **options):
    shape = describe_model(model, plugins)
    torch.manual_seed(seed)
    return build_model(
        model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=dtype, device=torch.device("cpu"),
        **options,
    )  # fmt: skip


def batch(model):
    """Two flat samples in a row, the first with a picture where the model sees."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 300, (1, 40), generator=generator)
    inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(25), torch.arange(15)])[None]}
    if model.vision is not None:
        ids[0, 2:18] = model.image_id
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=generator)
    labels = ids.clone()
    labels[0, :20] = labels[0, 25] = IGNORE_INDEX
    return inputs | {"labels": labels}


def step(model, optimizer):
    loss = model(**batch(model))["loss"]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


WAYS = ("frozen", "lora", "full")


@pytest.mark.parametrize(
    ("llm", "projector", "vision"),
    [ways for ways in itertools.product(WAYS, ("frozen", "full"), WAYS) if set(ways) != {"frozen"}],
)
def test_exactly_the_asked_parameters_change(tiny_llm_path, tiny_clip_path, plugins, llm, projector, vision):
    model = built(
        chosen(
            tiny_llm_path,
            tiny_clip_path,
            lora=ADAPTER if llm == "lora" else None,
            trainable=llm == "full",
            vision={
                "projector_trainable": projector == "full",
                "trainable": vision == "full",
                "lora": ADAPTER if vision == "lora" else None,
            },
        ),
        plugins,
    ).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, Optim(lr=1e-2)), lr=1e-2)
    step(model, optimizer), step(model, optimizer)  # the first step of an adapter moves only its second matrix
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    ways = {"llm": llm, "projector": projector, "vision": vision}
    asked = {
        name
        for name in before
        if (way := ways[name.partition(".")[0]]) == "full" or (way == "lora" and ".lora_" in name)
    }
    left_out = {name for name in asked if "post_layernorm" in name}  # behind select_layer: no feature depends on it
    assert changed == asked - left_out
    assert len(left_out) == (2 if vision == "full" else 0)
    assert all(parameter.requires_grad == (name in changed) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("way", [{"trainable": True}, {"lora": ADAPTER}], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "vit"])
def test_every_trained_parameter_of_an_encoder_gets_a_gradient(tmp_path, tiny_llm_path, plugins, kind, way):
    encoder = tiny_vision(tmp_path / kind, kind)
    model = built(chosen(tiny_llm_path, encoder, kind=kind, vision=way), plugins).train()
    model(**batch(model))["loss"].backward()
    trained = [(name, p) for name, p in model.vision.named_parameters() if p.requires_grad]
    assert trained
    assert [name for name, parameter in trained if parameter.grad is None] == []


def test_each_part_has_its_own_rate_and_decay_and_vectors_do_not_decay(tiny_llm_path, tiny_clip_path, plugins):
    model = built(chosen(tiny_llm_path, tiny_clip_path, lora=ADAPTER, vision={"trainable": True}), plugins)
    optim = Optim(lr=1e-4, projector_lr=2e-4, vision_lr=3e-4, weight_decay=0.1, vision_weight_decay=0.0)
    groups = {group["name"]: (group["lr"], group["weight_decay"]) for group in parameter_groups(model, optim)}
    assert groups == {
        "llm": (1e-4, 0.1),
        "projector": (2e-4, 0.1),
        "projector, no decay": (2e-4, 0.0),
        "vision": (3e-4, 0.0),
        "vision, no decay": (3e-4, 0.0),
    }


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("lora", [ADAPTER, DORA], ids=["", "dora"])
def test_an_adapter_learns_on_a_quantised_base(tiny_llm_path, tiny_clip_path, plugins, quantization, lora):
    parts = chosen(tiny_llm_path, tiny_clip_path, quantization=quantization, lora=lora, vision={"lora": lora})
    if (quantization, lora) == ("int8", DORA):  # peft and bitsandbytes cannot, on a CPU: said before a weight is read
        with pytest.raises(ModelError, match=r"^model\.llm\.lora\.dora: DoRA on int8 weights needs a GPU; "):
            built(parts, plugins)
        return
    model = built(parts, plugins).train()
    layers = quantized_layers(model)
    assert len(layers) == 14  # 7 in each of 2 blocks, none in the encoder or the projector
    if quantization != "int8":
        assert {(layer.weight.quant_type, layer.weight.compress_statistics) for layer in layers} == {
            (quantization, True)
        }
    before = [layer.weight.data.clone() for layer in layers]
    optimizer = torch.optim.AdamW(parameter_groups(model, Optim(lr=1e-2)), lr=1e-2)
    losses = [step(model, optimizer) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(layer.weight.data, weight) for layer, weight in zip(layers, before, strict=True))


@pytest.mark.parametrize(
    "parts",
    [
        {"trainable": True},
        {"lora": ADAPTER},
        {"trainable": True, "vision": {"trainable": True}},
        {"lora": ADAPTER, "vision": {"lora": ADAPTER}},
        {"lora": ADAPTER, "quantization": "nf4", "vision": {"projector_trainable": False}},
    ],
    ids=["text full", "text lora", "llava full", "llava lora", "llava qlora"],
)
def test_gradient_checkpointing_gives_the_same_gradients(tiny_llm_path, tiny_clip_path, plugins, parts):
    encoder = tiny_clip_path if "vision" in parts else None
    calls, gradients = [], []
    for checkpointing in (False, True):
        model = built(chosen(tiny_llm_path, encoder, **parts), plugins, gradient_checkpointing=checkpointing).train()
        for module in model.modules():
            if type(module).__name__ in ("LlamaDecoderLayer", "CLIPEncoderLayer"):
                key = (type(module).__name__, checkpointing)
                module.mlp.register_forward_pre_hook(lambda *_, key=key: calls.append(key))
        model(**batch(model))["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    counted = {key: calls.count(key) for key in calls}
    assert counted["LlamaDecoderLayer", True] == 2 * counted["LlamaDecoderLayer", False]  # run again going back
    if "vision" in parts and len(parts["vision"]) and "projector_trainable" not in parts["vision"]:
        assert counted["CLIPEncoderLayer", True] == 2 * counted["CLIPEncoderLayer", False]


def test_neftune_moves_word_embeddings_in_training_alone_and_never_a_picture(tiny_llm_path, tiny_clip_path, plugins):
    from transformers.integrations.neftune import activate_neftune  # what transformers' Trainer calls

    model = built(chosen(tiny_llm_path, tiny_clip_path, lora=ADAPTER), plugins)
    inputs = batch(model)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with torch.no_grad():
        clean = model.train().embed(ids, pixels)
        hook = activate_neftune(model, 5.0)
        noisy, quiet = model.embed(ids, pixels), model.eval().embed(ids, pixels)
        hook.remove()
    is_image = ids == model.image_id
    moved = (noisy - clean).abs()
    assert torch.equal(noisy[is_image], clean[is_image])
    assert moved[~is_image].min(-1).values.max() > 0
    limit = 5.0 / (ids.shape[1] * clean.shape[-1]) ** 0.5
    assert 0.9 * limit < moved.max() <= limit * 1.001
    assert torch.equal(quiet, clean)


STEPS = 20


@pytest.mark.parametrize(
    ("schedule", "options", "shares"),
    [
        ("cosine", {}, {10: 0.5, 20: 0.0}),
        ("linear", {}, {5: 0.75, 10: 0.5, 20: 0.0}),
        ("constant", {"warmup_ratio": 0.5}, {0: 1.0, 20: 1.0}),
        ("constant_with_warmup", {"warmup_ratio": 0.5}, {0: 0.0, 5: 0.5, 10: 1.0, 20: 1.0}),
        ("cosine_with_min_lr", {"min_lr_ratio": 0.2}, {0: 1.0, 10: 0.6, 20: 0.2}),
        ("warmup_stable_decay", {"decay_ratio": 0.5, "min_lr_ratio": 0.1}, {0: 1.0, 10: 1.0, 15: 0.55, 20: 0.1}),
        ("warmup_stable_decay", {"warmup_ratio": 0.2}, {2: 0.5, 4: 1.0, 18: 1.0, 19: 0.5, 20: 0.0}),
        ("polynomial", {}, {10: 0.5}),
        ("inverse_sqrt", {}, {}),
    ],
)
def test_a_schedule_gives_each_part_its_share_of_its_own_rate(schedule, options, shares):
    from transformers import get_scheduler

    optim = Optim(lr=1e-3, schedule=schedule, **{"warmup_ratio": 0.0, **options})
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (1e-3, 4e-3)]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr)
    scheduler = get_scheduler(
        schedule, optimizer, round(optim.warmup_ratio * STEPS), STEPS, schedule_options(optim, STEPS)
    )
    seen = []
    for _ in range(STEPS + 1):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert np.isfinite(seen).all()
    for at, share in shares.items():
        assert seen[at] == pytest.approx([1e-3 * share, 4e-3 * share], abs=1e-6), at
