"""`mmft convert hf`: trained models of many families, opened by plain transformers in a process without mmft."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from convert_models import FAMILIES, TOLERANCE, trained
from safetensors import safe_open
from safetensors.torch import load_file

from mmft.convert.hf.llava import export
from mmft.convert.merge import merge
from mmft.convert.parity import ParityError, ask_source, compare, proved, settle
from mmft.convert.probes import probes
from mmft.convert.results import OurResult, TransformersResult, is_our_code
from mmft.convert.verify import verify
from mmft.errors import CheckpointError
from mmft.inference import load_assistant, user_message
from mmft.types import Conversation

CPU = torch.device("cpu")


COMPOSED = [family for family in FAMILIES if family != "gemma2"]
TEXT, SEEN = "Name a colour.", "What is it?"
PLAIN = """
import json, sys

sys.modules["mmft"] = sys.modules["mmft_plugins"] = None  # importing them fails
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

asked, answers, (TEXT, SEEN, *CODE) = json.loads(sys.argv[1]), {}, sys.argv[3:]
for name, (folder, picture) in asked.items():
    if picture:
        trust = {"trust_remote_code": name in CODE}
        model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
        reader = AutoProcessor.from_pretrained(folder, **trust)
    else:
        model, reader = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text in (TEXT, SEEN) if picture else (TEXT,):
        content = [{"type": "image", "path": picture}, {"type": "text", "text": text}] if text == SEEN else text
        inputs = reader.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True, return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
            tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        answers[name + ": " + text] = inputs["input_ids"][0].tolist(), logits, tokens.tolist()
torch.save(answers, sys.argv[2])
"""
SHUFFLE = ("pixel_shuffle", {"depth": 1, "norm": True})  # the demo's
OTHERS = {
    "llama, one linear layer": {"projector": "linear"},
    "llama, pixel shuffle after a ViT": {"projector": "pixel_shuffle", "encoder": "vit"},
    "qwen2, pixel shuffle after DINOv2": {
        "projector": SHUFFLE, "encoder": "dinov2", "encoder_options": {"image_size": 56}, "family": "qwen2"
    },
    "llama, pixel shuffle after CLIP": {"projector": "pixel_shuffle"},
    "qwen2, three layers after SigLIP": {"projector": "mlp3x_gelu", "encoder": "siglip", "family": "qwen2"},
}  # fmt: skip
CLASSES = dict(
    zip(OTHERS, ["Llava", "InternVL", "InternVL", "MmftLlava", "MmftLlava"], strict=True), **{"phi3 clip": "Llava"}
)
CODE = [name for name, kind in CLASSES.items() if kind == "MmftLlava"]


@pytest.fixture(scope="module")
def families(tmp_path_factory, plugins):
    """Every family with both encoders, and text alone, exported: name -> (ours, folder, whether it sees)."""
    found = {}
    for family in COMPOSED:
        for encoder in ("clip", "siglip"):
            root = tmp_path_factory.mktemp(f"{family}_{encoder}")
            folder = trained(root, plugins, family=family, encoder=encoder)
            export(folder, root / "out", plugins, device=CPU)
            found[f"{family} {encoder}"] = folder, root / "out", True
    for name, case in OTHERS.items():
        root = tmp_path_factory.mktemp("other")
        folder = trained(root, plugins, **case)
        export(folder, root / "out", plugins, device=CPU)
        found[name] = folder, root / "out", True
    folder, _, _ = found["qwen2 siglip"]
    merge(folder, folder / "../merged", plugins, device=CPU)
    export(folder / "../merged", folder / "../merged_out", plugins, device=CPU)
    found["qwen2 siglip, merged first"] = folder, folder / "../merged_out", True
    root = tmp_path_factory.mktemp("text")
    folder = trained(root, plugins, family="gemma2", encoder=None)
    export(folder, root / "out", plugins, device=CPU)
    return found | {"gemma2 alone": (folder, root / "out", False)}


@pytest.fixture(scope="module")
def theirs(families, tmp_path_factory, environment):
    """What plain transformers makes of all of them, in one fresh process."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("plain")
    Image.linear_gradient("L").resize((61, 40)).convert("RGB").save(folder / "a.png")
    asked = {name: (str(out), str(folder / "a.png") if sees else None) for name, (_, out, sees) in families.items()}
    (folder / "plain.py").write_text(PLAIN, "utf-8")
    subprocess.run(
        [
            sys.executable, "-P", str(folder / "plain.py"), json.dumps(asked), str(folder / "answers.pt"), TEXT, SEEN,
            *CODE,
        ],
        check=True, capture_output=True, text=True, timeout=240, cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(folder / "modules")},
    )  # fmt: skip
    return torch.load(folder / "answers.pt"), folder / "a.png"


def ours_on(folder, plugins, text, picture):
    result = OurResult(load_assistant(folder, plugins, device=CPU))
    conversation = Conversation((user_message(text, [picture] if text == SEEN else []),))
    return result.inputs(conversation)[0], result.logits(conversation, [])[0], result.greedy(conversation, 8)


SINGLE = ["gemma2 alone", "qwen2 siglip, merged first"]


@pytest.mark.parametrize("name", [f"{f} {e}" for f in COMPOSED for e in ("clip", "siglip")] + [*OTHERS, *SINGLE])
def test_plain_transformers_gives_the_trained_models_logits_and_answers(name, families, theirs, plugins):
    folder, _, sees = families[name]
    answers, picture = theirs
    for text in (TEXT, SEEN) if sees else (TEXT,):
        ids, logits, tokens = answers[f"{name}: {text}"]
        expected_ids, expected, expected_tokens = ours_on(folder, plugins, text, picture)
        assert ids == expected_ids
        difference = (logits[: len(expected)] - expected).abs().max()
        assert difference < TOLERANCE * max(1.0, float(expected.abs().max()))
        assert tokens == expected_tokens


def test_weights_and_config_are_spelled_as_on_the_hub(families):
    _, out, _ = families["qwen2 clip"]
    with safe_open(out / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert {name.split(".layers.")[0] for name in names if ".layers." in name} == {
        "language_model.model", "vision_tower.vision_model.encoder"
    }  # fmt: skip
    assert "language_model.lm_head.weight" not in names  # tied
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert (config["vision_feature_layer"], config["vision_config"]["num_hidden_layers"]) == (2, 2)
    assert config["vision_feature_select_strategy"] == "default"
    assert config["text_config"]["use_cache"] is True
    assert "_name_or_path" not in config["vision_config"]
    processor = json.loads((out / "processor_config.json").read_text("utf-8"))
    assert (processor["num_additional_image_tokens"], processor["patch_size"]) == (1, 7)
    assert processor["image_processor"]["do_pad"] is True
    assert json.loads((out / "preprocessor_config.json").read_text("utf-8"))["image_mean"][0] == 0.48145466
    generation = json.loads((out / "generation_config.json").read_text("utf-8"))
    assert generation["eos_token_id"] == [2]  # <|im_end|>
    parity = json.loads((out / "parity.json").read_text("utf-8"))
    assert parity["verified"] is True
    assert len(parity["outcomes"]) == 11


@pytest.mark.parametrize("name", CLASSES)
def test_each_projector_goes_to_the_class_that_has_a_place_for_it(name, families):
    _, out, _ = families[name]
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["architectures"] == [f"{CLASSES[name]}ForConditionalGeneration"]
    assert (out / "modeling_mmft_llava.py").is_file() == (name in CODE) == ("auto_map" in config)
    parity = json.loads((out / "parity.json").read_text("utf-8"))
    assert ("trust_remote_code=True" in parity["note"]) == (name in CODE)
    assert json.loads((out / "processor_config.json").read_text("utf-8"))["processor_class"] == "LlavaProcessor"


def test_an_export_with_code_is_never_opened_as_something_else(families):
    from transformers import AutoModelForImageTextToText

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForImageTextToText.from_pretrained(families[CODE[0]][1], trust_remote_code=False)


@pytest.mark.parametrize("named", [None, "acme.Model", "acme/model--modeling_mmft_llava.Model"])
def test_the_gate_runs_no_code_that_is_not_ours(named, families, tmp_path):
    shutil.copytree(families[CODE[0]][1], tmp_path / "out")
    path = tmp_path / "out" / ("config.json" if named else "modeling_mmft_llava.py")
    text = path.read_text("utf-8")
    assert is_our_code(tmp_path / "out")
    if named:
        content = json.loads(text)
        content["auto_map"]["AutoConfig"] = named
        path.write_text(json.dumps(content), "utf-8")
    else:
        path.write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{text}", "utf-8")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        TransformersResult(tmp_path / "out", sees=True, dtype=torch.float32, device=CPU)
    assert not (tmp_path / "ran").exists()


def test_what_was_not_trained_is_kept_bit_by_bit(families):
    folder, out, _ = families["llama clip"]
    root, level = folder.parent.parent, "vision_tower.vision_model."
    exported = load_file(out / "model.safetensors")
    llm, encoder = (load_file(root / name / "model.safetensors") for name in ("llm", "encoder"))
    kept = {f"language_model.{key}": value for key, value in llm.items() if "norm" in key}
    kept |= {level + key.removeprefix("vision_model."): value for key, value in encoder.items() if ".layers.1." in key}
    assert len(kept) > 15
    assert all(torch.equal(exported[key], value) for key, value in kept.items())


def test_the_processor_writes_tools_and_pictures_as_training_did(families, plugins, theirs):
    from transformers import AutoProcessor

    folder, out, _ = families["qwen3 clip"]
    tool = {"type": "function", "function": {"name": "zoom", "description": "x", "parameters": {}}}
    content = [{"type": "image", "path": str(theirs[1])}, {"type": "text", "text": SEEN}]
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    ids = processor.apply_chat_template(
        [{"role": "user", "content": content}], tools=[tool], tokenize=True, add_generation_prompt=True,
        return_dict=True, return_tensors="pt",
    )["input_ids"][0].tolist()  # fmt: skip
    assistant = load_assistant(folder, plugins, device=CPU)
    conversation = Conversation((user_message(SEEN, [theirs[1]]),), (tool,))
    assert ids == assistant.prompt(conversation).input_ids.tolist()
    assert "zoom" in processor.decode(ids)


def test_several_prompts_at_once_are_answered_as_alone(families, theirs):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _, out, _ = families["llama siglip"]
    answers, picture = theirs
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    seen = [{"type": "image", "path": str(picture)}, {"type": "text", "text": SEEN}]
    talks = [[{"role": "user", "content": content}] for content in (seen, [{"type": "text", "text": TEXT}])]
    inputs = processor.apply_chat_template(
        talks,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        processor_kwargs={"return_tensors": "pt", "padding": True},
    )
    assert inputs["attention_mask"][1, 0] == 0  # padded before the shorter one
    generated = AutoModelForImageTextToText.from_pretrained(out).generate(**inputs, max_new_tokens=8, do_sample=False)
    for row, text in zip(generated[:, inputs["input_ids"].shape[1] :].tolist(), (SEEN, TEXT), strict=True):
        expected = answers[f"llama siglip: {text}"][2]
        assert row[: len(expected)] == expected


def test_siglip_has_no_cls_to_drop(families):
    config = json.loads((families["llama siglip"][1] / "config.json").read_text("utf-8"))
    assert config["vision_feature_select_strategy"] == "full"


def test_another_models_answers_fail_the_gate_and_nothing_is_written(families, plugins, tmp_path):
    _, other, _ = families["llama clip"]
    (tmp_path / "b").mkdir()
    different = trained(tmp_path / "b", plugins, llm={})  # the same base without the adapter
    source = load_assistant(different, plugins, device=CPU)
    with probes(pictures=True) as asked:
        answers = ask_source(OurResult(source), asked)
        result = TransformersResult(other, sees=True, dtype=torch.float32, device=CPU)
        report = compare(answers, result, source.shape.tokenizer, dtype=torch.float32, tolerance=1e-4)
    assert not report.verified
    with (
        pytest.raises(ParityError, match=r"the logits differ by .* of their size; 0.0001 is allowed.*not written"),
        proved(tmp_path / "out", overwrite=False) as temporary,
    ):
        settle(report, temporary, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / ".out.unproved" / "parity.json").read_text("utf-8"))["verified"] is False


def test_an_export_is_verified_again_and_another_models_is_not(families, plugins, tmp_path):
    folder, out, _ = families["llama clip"]
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "parity.json").unlink()
    assert verify(tmp_path / "out", folder, plugins, device=CPU).verified
    other, _, _ = families["llama, one linear layer"]
    with pytest.raises(ParityError, match=r"out does not give what .* gives: .*parity.json.* left as it is"):
        verify(tmp_path / "out", other, plugins, device=CPU)
    assert json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))["verified"] is True


def test_a_folder_that_is_there_is_not_overwritten_unasked(families, plugins):
    folder, out, _ = families["llama clip"]
    with pytest.raises(CheckpointError, match=r"exists already.*--overwrite"):
        export(folder, out, plugins, device=CPU)
