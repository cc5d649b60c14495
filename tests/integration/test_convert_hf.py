"""`mmft convert hf`: trained models of many families, opened by plain transformers in a process without mmft."""

import json
import subprocess
import sys

import pytest
import torch
from convert_models import FAMILIES, LORA, trained
from safetensors import safe_open

from mmft.convert.hf_llava import export
from mmft.convert.parity import ParityError, ask_source, compare, probes, proved, settle
from mmft.convert.results import OurResult, TransformersResult
from mmft.errors import CheckpointError, ModelError
from mmft.inference import load_assistant

CPU = torch.device("cpu")
COMPOSED = [family for family in FAMILIES if family != "gemma2"]
# float32 logits of a size of about 1 to 10; measured 2.4e-6 of their size over everything below. A lost adapter, a
# wrong layer or a CLS token left in give 0.1 and more.
TOLERANCE = 2e-5
TEXT, SEEN = "Name a colour.", "What is it?"
PLAIN = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

asked, answers, (TEXT, SEEN) = json.loads(sys.argv[1]), {}, sys.argv[3:]
for name, (folder, picture) in asked.items():
    if picture:
        model, reader = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
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
assert not [name for name in sys.modules if name.partition(".")[0] in ("mmft", "mmft_plugins")]
torch.save(answers, sys.argv[2])
"""


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
        [sys.executable, "-P", str(folder / "plain.py"), json.dumps(asked), str(folder / "answers.pt"), TEXT, SEEN],
        check=True, capture_output=True, text=True, timeout=240, env={**environment, "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )  # fmt: skip
    return torch.load(folder / "answers.pt"), folder / "a.png"


def ours_on(folder, plugins, text, picture):
    from mmft.inference import user_message
    from mmft.types import Conversation

    result = OurResult(load_assistant(folder, plugins, device=CPU))
    conversation = Conversation((user_message(text, [picture] if text == SEEN else []),))
    return result.inputs(conversation)[0], result.logits(conversation, [])[0], result.greedy(conversation, 8)


@pytest.mark.parametrize("name", [f"{f} {e}" for f in COMPOSED for e in ("clip", "siglip")] + ["gemma2 alone"])
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
    assert len(parity["outcomes"]) == 9


def test_siglip_has_no_cls_to_drop(families):
    config = json.loads((families["llama siglip"][1] / "config.json").read_text("utf-8"))
    assert config["vision_feature_select_strategy"] == "full"


ENCODERS = {
    "dinov2, whose positions are interpolated unasked": ("dinov2", {"image_size": 42}),
    "clip for larger pictures": ("clip", {"image_size": 42}),
    "siglip for larger pictures, padded": ("siglip", {"image_size": 42, "pad_to_square": True}),
    "clip's embeddings": ("clip", {"select_layer": 0, "pad_to_square": False}),
    "siglip's last block": ("siglip", {"select_layer": -1}),
    "dinov2's last block": ("dinov2", {"select_layer": -1}),
    "vit": ("vit", {}),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_encoders_layers_and_sizes_survive(case, plugins, tmp_path):
    encoder, options = ENCODERS[case]
    folder = trained(tmp_path, plugins, encoder=encoder, encoder_options=options)
    report = export(folder, tmp_path / "out", plugins, device=CPU)
    assert all(outcome.same_answer and outcome.relative < TOLERANCE for outcome in report.outcomes)


TRAINED = {
    "vision lora, rows beyond the vocabulary": {"llm": {}, "vision": {"lora": LORA}, "family": "qwen3", "rows": 40},
    "whole encoder": {"vision": {"trainable": True}, "encoder": "siglip"},
    "whole llm": {"llm": {"trainable": True}},
    "new tokens, tied": {"llm": {"lora": LORA, "new_tokens": ("<a>", "<b>")}, "family": "qwen2"},
    "vicuna": {"template": "vicuna", "bos": "<s>", "eos": "</s>", "special": ("<unk>", "<s>", "</s>")},
    "the tokenizer's own template": {"template": "auto"},
}


@pytest.mark.parametrize("case", TRAINED)
def test_whatever_was_trained_is_in_it(case, plugins, tmp_path):
    report = export(trained(tmp_path, plugins, **TRAINED[case]), tmp_path / "out", plugins, device=CPU)
    assert len(report.outcomes) == 9
    assert all(outcome.same_answer and outcome.relative < TOLERANCE for outcome in report.outcomes)


def test_a_projector_without_a_class_is_refused_with_what_to_choose(plugins, tmp_path):
    folder = trained(tmp_path, plugins, projector="linear")
    with pytest.raises(ModelError, match=r"'linear'.*two linear layers.*train with projector 'mlp2x_gelu'"):
        export(folder, tmp_path / "out", plugins, device=CPU)
    assert not (tmp_path / "out").exists()


def test_a_model_that_caps_its_logits_is_refused(plugins, tmp_path):
    folder = trained(tmp_path, plugins, family="gemma2")
    with pytest.raises(ModelError, match=r"Gemma2ForCausalLM caps or scales its logits.*convert merge"):
        export(folder, tmp_path / "out", plugins, device=CPU)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


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


def test_a_folder_that_is_there_is_not_overwritten_unasked(families, plugins):
    folder, out, _ = families["llama clip"]
    with pytest.raises(CheckpointError, match=r"exists already.*--overwrite"):
        export(folder, out, plugins, device=CPU)
