"""Whole runs of each way to train: what they learn, save, and go on from."""

import json
import shutil

import pytest
import torch

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, override, use
from mmft.data.shape import describe_model
from mmft.inference import load_assistant
from mmft.types import Conversation, Message, Text


def chosen(llm, encoder=None, **parts) -> Model:
    vision = {"encoder": use("clip", path=str(encoder)), "projector": use("mlp2x_gelu"), **parts.pop("vision", {})}
    return Model(llm=LLM(path=str(llm), **parts), vision=Vision(**vision) if encoder else None)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Records, half of them with a picture; they spell the tokens <loc_1> and <loc_2>."""
    from PIL import Image

    root = tmp_path_factory.mktemp("methods")
    records = []
    for i in range(8):
        answer = f"It is at <loc_{1 + i % 2}>."
        Image.new("RGB", (30, 30), (30 * i, 100, 50)).save(root / f"{i}.png")
        question = "<image>\nWhere?" if i % 2 else "Where?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": i, "conversations": turns} | ({"image": f"{i}.png"} if i % 2 else {}))
    (root / "records.json").write_text(json.dumps(records))
    return root


def config(world, model, name, **changes) -> TrainConfig:
    plain = TrainConfig(
        model=model,
        data=Data(
            datasets=(Dataset(source=use("json", path=world / "records.json"), data_map="llava", image_folder=world),),
            chat_template="chatml",
            max_length=256,
        ),
        optim=Optim(lr=1e-2, max_steps=4, batch_size_per_device=2, epochs=10, warmup_ratio=0.0),
        runtime=Runtime(output_dir=world / name, save_steps=2, save_total_limit=9, logging_steps=1, device="cpu"),
    )
    return override(plain, changes)


def run(config, plugins, **options):
    from mmft.train.run import train

    assert train(config, plugins, **options) == 0
    return config.runtime.output_dir


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


TOKENS = {"new_tokens": ("<loc_1>", "<loc_2>")}
RESUMED = {
    "pissa": {"lora": Lora(r=4, init="pissa")},
    "dora, new tokens": {"lora": Lora(r=4, dora=True, init="gaussian"), **TOKENS},
    "nf4, new tokens": {"lora": Lora(r=4), "quantization": "nf4", **TOKENS},
    "full, new tokens": {"trainable": True, **TOKENS},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_goes_on_from_a_checkpoint_ends_in_the_same_files(
    world, tiny_llm_path, tiny_clip_path, plugins, name
):
    model = chosen(tiny_llm_path, tiny_clip_path, vision={"lora": Lora(r=4, init="olora")}, **RESUMED[name])
    plain = config(world, model, f"straight {name}")
    folder = run(plain, plugins)
    assert len(list((folder / "final").rglob("*.safetensors"))) == 3  # language model, projector, encoder's adapter
    assert_goes_on_the_same(plain, plugins, folder)


def assert_goes_on_the_same(plain, plugins, straight):
    """From the checkpoint in the middle to the very files at the end."""
    resumed = straight.with_name(f"{straight.name} resumed")
    shutil.copytree(straight, resumed)
    for folder in ("checkpoint-4", "final"):
        shutil.rmtree(resumed / folder)
    run(override(plain, {"runtime.output_dir": resumed}), plugins, resume=True)
    for path in sorted((straight / "final").rglob("*.safetensors")):
        file = path.relative_to(straight)
        assert path.read_bytes() == (resumed / file).read_bytes(), file


@pytest.mark.parametrize("way", [{"lora": Lora(r=4, init="pissa")}, {"trainable": True}], ids=["lora", "full"])
def test_new_tokens_are_learnt_saved_and_known_in_chat(world, tiny_llm_path, tiny_clip_path, plugins, way):
    model = chosen(tiny_llm_path, tiny_clip_path, **way, **TOKENS)
    base = describe_model(chosen(tiny_llm_path), plugins).tokenizer
    shape = describe_model(model, plugins)
    first = len(base.hf)
    assert [ids.tolist() for ids in shape.tokenizer.encode(["<loc_1>", "<loc_2>"])] == [[first], [first + 1]]
    assert shape.tokenizer.encode(["<loc_1>"], as_data=True)[0].tolist() == [first]  # a record may spell it
    assert shape.tokenizer.image_id == first + 2
    chat = config(world, model, f"tokens {list(way)}", **{"optim.max_steps": 60 if "trainable" in way else 4})
    folder = run(chat, plugins)
    assistant = load_assistant(folder / "final", plugins, device=torch.device("cpu"))
    assert assistant.shape.tokenizer.image_id == first + 2
    assert [ids.tolist() for ids in assistant.shape.tokenizer.encode(["<loc_2>"])] == [[first + 1]]
    rows = assistant.model.causal_lm.get_input_embeddings().weight
    assert len(rows) == len(assistant.model.causal_lm.get_output_embeddings().weight) == first + 2
    assert not torch.equal(rows[first], rows[first + 1])  # they began as the same mean
    if "trainable" in way:  # an adapter on random weights learns no text in so few steps
        answer = assistant.answer(Conversation((Message("user", (Text("Where?"),)),)))
        assert answer == "It is at <loc_1>."  # every record without a picture says so


def test_whole_embeddings_are_not_saved_beside_an_adapter(world):
    from safetensors.torch import load_file

    state = load_file(next(world.glob("tokens*lora*")) / "final" / "llm_adapter" / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[0] == "" for name in state} == {True, False}
    assert [list(t.shape) for name, t in state.items() if ".lora_" not in name] == [[2, 32], [2, 32]]


QUANTISED = "__bnb_optimizer_quant_state__"  # where bitsandbytes keeps its tensors in a state dict


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor"])
def test_an_optimizer_takes_real_steps_and_an_8_bit_one_keeps_bytes(world, tiny_llm_path, plugins, optimizer):
    changes = {"optim.optimizer": optimizer, "optim.lr": 1e-3, "data.datasets.0.source.path": texts(world)}
    plain = config(world, chosen(tiny_llm_path, trainable=True), optimizer, **changes)
    folder = run(plain, plugins)
    losses = [line["loss"] for line in lines(folder)]
    assert losses[-1] < losses[0]
    state = torch.load(folder / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    found = [values[QUANTISED]["state1"] for values in state.values() if QUANTISED in values]
    kinds = {tensor.dtype for tensor in found if tensor.numel() > 10_000}
    if optimizer == "adafactor":
        assert not found
        return
    # the embedding keeps 32 bits beside an 8-bit head: both are about 400 x 32
    assert kinds == ({torch.uint8, torch.float32} if "8bit" in optimizer else {torch.float32})
    if optimizer == "adamw_8bit":
        assert_goes_on_the_same(plain, plugins, folder)


def texts(world):
    """The records without pictures."""
    path = world / "texts.json"
    path.write_text(json.dumps(json.loads((world / "records.json").read_text())[::2]))
    return path


def test_a_run_has_the_schedule_the_noise_and_the_precision_of_its_config(world, tiny_llm_path, plugins):
    model = chosen(tiny_llm_path, lora=Lora(r=4))
    changes = {
        "data.datasets.0.source.path": texts(world),
        "optim.schedule": "cosine_with_min_lr",
        "optim.min_lr_ratio": 0.5,
    }
    plain = lines(run(config(world, model, "plain", **changes), plugins))
    noisy = lines(run(config(world, model, "noisy", **changes, **{"optim.neftune_alpha": 20.0}), plugins))
    half = lines(run(config(world, model, "bf16", **changes, **{"runtime.precision": "bf16"}), plugins))
    assert plain[0]["lr"] == pytest.approx(1e-2)
    assert 5e-3 <= plain[-1]["lr"] < 7e-3
    assert plain[0]["loss"] != noisy[0]["loss"]
    assert plain[0]["loss"] != half[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.02)
