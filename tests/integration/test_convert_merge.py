"""`mmft convert merge`: adapters in the weights, the result a model folder of ours whose llm/ is a plain HF model."""

import json

import pytest
import torch
from convert_models import LORA, family_llm, shake, trained
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mmft.convert.adapters import merge_adapter, split
from mmft.convert.merge import merge
from mmft.convert.probes import PROBES
from mmft.errors import CheckpointError, ModelError
from mmft.inference import load_assistant, user_message
from mmft.testing import tiny_vision
from mmft.types import Conversation

CPU = torch.device("cpu")
# Of the logits' size, float32: measured 2.4e-6 (rslora); 4-bit the same, because the merge is onto what it computed
# with. Onto the original weights it would be 0.1 and more. LLM.int8() rounds the activations: 3.6e-2 measured.
TOLERANCE = 2e-5
CASES = {
    "lora": {},
    "lora, tied": {"family": "qwen2"},
    "dora": {"llm": {"lora": LORA.model_copy(update={"dora": True})}},
    "rslora": {"llm": {"lora": LORA.model_copy(update={"rslora": True})}},
    "pissa": {"llm": {"lora": LORA.model_copy(update={"init": "pissa"})}, "encoder": None},
    "new tokens": {"llm": {"lora": LORA, "new_tokens": ("<a>", "<b>")}},
    "new tokens, tied": {"llm": {"lora": LORA, "new_tokens": ("<a>", "<b>")}, "family": "qwen2"},
    "vision lora": {"llm": {}, "vision": {"lora": LORA}},
    "whole llm and encoder": {"llm": {"trainable": True}, "vision": {"trainable": True}},
    "capped logits": {"family": "gemma2"},
    "4-bit": {"llm": {"lora": LORA, "quantization": "nf4"}},
    "a template without a jinja": {"llm": {}, "template": "plain"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_is_the_trained_one(case, plugins, tmp_path):
    folder = trained(tmp_path, plugins, **CASES[case])
    report = merge(folder, tmp_path / "out", plugins, device=CPU)
    assert report.verified
    assert all(outcome.same_answer and outcome.relative < TOLERANCE for outcome in report.outcomes)
    merged = load_assistant(tmp_path / "out", plugins, device=CPU)  # checks every file's sha256
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    content = json.loads((tmp_path / "out" / "mmft.json").read_text("utf-8"))
    assert (content["model"]["llm"]["lora"], content["model"]["llm"]["quantization"]) == (None, "none")


def test_int8_is_merged_within_the_rounding_of_its_activations(plugins, tmp_path):
    folder = trained(tmp_path, plugins, llm={"lora": LORA, "quantization": "int8"}, encoder=None)
    assert merge(folder, tmp_path / "out", plugins, device=CPU).verified


def test_the_llm_folder_is_a_plain_model_that_answers_as_the_run_does(plugins, tmp_path):
    folder = trained(tmp_path, plugins, family="qwen3")
    merge(folder, tmp_path / "out", plugins, device=CPU)
    ours = load_assistant(folder, plugins, device=CPU)
    plain, hf = (kind.from_pretrained(tmp_path / "out" / "llm") for kind in (AutoModelForCausalLM, AutoTokenizer))
    question = [{"role": "user", "content": "Name a colour."}]
    inputs = hf.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    generated = plain.generate(**inputs, max_new_tokens=512, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = ours.answer(Conversation((user_message("Name a colour."),)))
    assert answer
    assert hf.decode(generated, skip_special_tokens=True).strip() == answer.strip()


def test_shards_are_no_larger_than_asked_for(plugins, tmp_path):
    folder = trained(tmp_path, plugins, encoder=None)
    merge(folder, tmp_path / "out", plugins, device=CPU, max_shard_size="40KB")
    shards = list((tmp_path / "out" / "llm").glob("*.safetensors"))
    assert len(shards) > 2
    data = [sum(one.numel() * 4 for one in tensors(shard).values()) for shard in shards]
    assert max(data) <= max(40_000, 400 * 32 * 4)  # a single matrix may be larger
    assert (tmp_path / "out" / "llm" / "model.safetensors.index.json").is_file()


def test_another_dtype_is_what_is_written(plugins, tmp_path):
    folder = trained(tmp_path, plugins, encoder=None)
    merge(folder, tmp_path / "out", plugins, device=CPU, dtype="bf16")
    found = tensors(tmp_path / "out" / "llm" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "mmft.json").read_text("utf-8"))["precision"] == "bf16"
    settings = json.loads((tmp_path / "out" / "llm" / "generation_config.json").read_text("utf-8"))
    assert settings["eos_token_id"]
    assert not [key for key in settings if key.startswith("_")]  # transformers' own marks
    assert json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))["source"] == str(folder)


def test_the_command_says_what_it_verified_and_fails_with_one_line(mmft, plugins, tmp_path):
    folder = trained(tmp_path, plugins, encoder=None)
    result = mmft("convert", "merge", folder, tmp_path / "out", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "verified in float32: 7 probes, 7 with the same greedy answer" in result.stdout
    result = mmft("convert", "merge", folder, tmp_path / "out")
    assert result.returncode == 2
    assert "exists already" in result.stderr
    assert "Traceback" not in result.stderr


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def test_one_adapter_is_merged_into_one_base_as_in_xtuner(plugins, tmp_path):
    folder = trained(tmp_path, plugins)
    report = merge_adapter(str(tmp_path / "llm"), folder / "llm_adapter", tmp_path / "out", device=CPU)
    assert report.verified
    assert [outcome.probe for outcome in report.outcomes] == [probe.name for probe in PROBES if not probe.pictures]
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("llm", "out"))
    assert not torch.equal(
        *(state["model.layers.0.self_attn.q_proj.weight"] for state in (before, after))
    )  # it is in the weights
    with pytest.raises(CheckpointError, match=r"no PEFT adapter: it has no adapter_config.json"):
        merge_adapter(str(tmp_path / "llm"), folder, tmp_path / "no", device=CPU)


def test_an_encoders_adapter_is_merged_with_is_clip(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny_vision(tmp_path / "clip")
    adapted = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
    shake(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(str(base), tmp_path / "adapter", tmp_path / "out", is_clip=True, device=CPU)
    assert report.verified
    assert [outcome.probe for outcome in report.outcomes] == [probe.name for probe in PROBES if probe.pictures]
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def adapter_of(model, folder, *, change=True, rename=lambda key: key):
    """A LoRA folder whose keys are named as `rename` says."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    if change:
        shake(adapted)
    adapted.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    save_file({rename(key): value for key, value in tensors(path).items()}, path, metadata={"format": "pt"})
    return folder


def test_an_encoders_adapter_as_xtuner_names_it_is_in_the_merged_weights(tmp_path):
    """XTuner's transformers has one level more; PEFT would warn, and merge nothing."""
    base, key = tiny_vision(tmp_path / "clip"), "encoder.layers.0.self_attn.q_proj.weight"
    level = lambda name: name.replace("base_model.model.", "base_model.model.vision_model.")  # noqa: E731
    adapter = adapter_of(AutoModel.from_pretrained(base), tmp_path / "adapter", rename=level)
    report = merge_adapter(str(base), adapter, tmp_path / "out", is_clip=True, device=CPU)
    assert report.verified
    before, after = (AutoModel.from_pretrained(path).state_dict()[key] for path in (base, tmp_path / "out"))
    low = tensors(adapter / "adapter_model.safetensors")
    name = "base_model.model.vision_model." + key.removesuffix("weight")
    change = low[name + "lora_B.weight"] @ low[name + "lora_A.weight"] * (8 / 2)
    assert torch.allclose(after - before, change, atol=1e-6)


def test_an_adapter_that_would_merge_nothing_is_refused(tmp_path):
    base = family_llm(tmp_path / "llm", "llama")
    cases = {
        "no prefix": (lambda key: key.replace("base_model.model.model.", "base_model.model."), True),
        "less": (lambda key: key.replace("layers.1.", "layers.7."), True),
        "untrained": (lambda key: key, False),
    }
    words = {
        "no prefix": r"does not fit .*: it has \S*layers\.0\.self_attn\.q_proj\.lora_A\S* \(4 weights have no",
        "less": r"it has \S*layers\.7\S* \(2 weights have no place, 2 are missing\); give the model it was trained on",
        "untrained": r"changes nothing in ",
    }
    for case, (rename, change) in cases.items():
        model = AutoModelForCausalLM.from_pretrained(base)
        adapter = adapter_of(model, tmp_path / case, change=change, rename=rename)
        with pytest.raises(CheckpointError, match=words[case]) as caught:
            merge_adapter(str(base), adapter, tmp_path / "out", device=CPU)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_base_model_with_code_of_its_own_needs_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = family_llm(tmp_path / "llm", "llama")
    adapter = adapter_of(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    (base / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text("utf-8"))
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ModelError, match=r"give --trust-remote-code if you trust it$") as caught:
        merge_adapter(str(base), adapter, tmp_path / "out", device=CPU)
    assert "\n" not in str(caught.value)
    assert merge_adapter(str(base), adapter, tmp_path / "out", device=CPU, trust_remote_code=True).verified


def test_split_takes_the_models_weights_and_everything_beside_them(tmp_path):
    base = family_llm(tmp_path / "llm", "llama")
    save_file({"layers.0": torch.zeros(3)}, base / "consolidated.safetensors")
    (base / "assets").mkdir()
    (base / "assets" / "code.py").write_text("pass")
    names = split(base, tmp_path / "out", max_shard_size="60KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"]) == tensors(base / "model.safetensors").keys()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    assert (tmp_path / "out" / "assets" / "code.py").is_file()
    assert split(tmp_path / "out", tmp_path / "again") == ["model.safetensors"]  # by the index, back into one
    assert split(base, tmp_path / "again", overwrite=True)  # what it wrote itself
    (tmp_path / "out" / names[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[0]} is missing, which model.safetensors.index.json names"):
        split(tmp_path / "out", tmp_path / "third")


def test_split_refuses_a_model_folder_of_several_parts(tmp_path, plugins):
    folder = trained(tmp_path, plugins, encoder=None, llm={"trainable": True})
    with pytest.raises(CheckpointError, match=r"is a model folder of mmft, of several parts; use `mmft convert merge`"):
        split(folder, tmp_path / "out")


def test_split_keeps_every_bit(tmp_path):
    base = family_llm(tmp_path / "llm", "llama")
    names = split(base, tmp_path / "out", max_shard_size="60KB")
    assert len(names) > 1
    whole = tensors(base / "model.safetensors")
    pieces = {key: value for name in names for key, value in tensors(tmp_path / "out" / name).items()}
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(value, pieces[key]) for key, value in whole.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    with pytest.raises(CheckpointError, match=r"holds no model\*\.safetensors"):
        split(tmp_path, tmp_path / "no")
