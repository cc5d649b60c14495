"""`mmft convert merge`: adapters in the weights, the result a model folder of ours whose llm/ is a plain HF model."""

import json

import pytest
import torch
from convert_models import LORA, family_llm, shake, trained
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from mmft.convert.adapters import merge_adapter, split
from mmft.convert.merge import merge
from mmft.errors import CheckpointError
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


def test_the_command_says_what_it_verified_and_fails_with_one_line(mmft, plugins, tmp_path):
    folder = trained(tmp_path, plugins, encoder=None)
    result = mmft("convert", "merge", folder, tmp_path / "out", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert "verified in float32: 5 probes, 5 with the same greedy answer" in result.stdout
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
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_split_keeps_every_bit(tmp_path):
    base = family_llm(tmp_path / "llm", "llama")
    names = split(base, tmp_path / "out", max_shard_size="60KB")
    assert len(names) > 1
    whole = tensors(base / "model.safetensors")
    pieces = {key: value for name in names for key, value in tensors(tmp_path / "out" / name).items()}
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(value, pieces[key]) for key, value in whole.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
    with pytest.raises(CheckpointError, match=r"holds no safetensors"):
        split(tmp_path, tmp_path / "no")
