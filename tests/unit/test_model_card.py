"""The model card says what the run's files say, and nothing that they do not."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.convert.push.model_card import Wishes, gather, write_card
from mmft.modeling.checkpoint import decides_weights

HOME = "/home/ming-the-person"
PARITY = {
    "verified": True, "dtype": "bfloat16", "tolerance": 0.05,
    "outcomes": [{"relative": 0.003, "same_answer": True}, {"relative": 0.02, "same_answer": False}],
}  # fmt: skip


def manifest(*, sees: bool = True, llm: LLM | None = None, **more) -> dict:
    encoder = use("clip", path="openai/clip-vit-large-patch14-336")
    llm = llm or LLM(path=f"{HOME}/models/base-1b", quantization="nf4", lora=Lora(r=8, alpha=16))
    datasets = (
        Dataset(source=use("json", path=f"{HOME}/data/mine.json"), data_map="llava", limit=100),
        Dataset(source=use("hf", path="acme/chats"), data_map="messages"),
    )
    config = TrainConfig(
        model=Model(llm=llm, vision=Vision(encoder=encoder, projector=use("mlp2x_gelu")) if sees else None),
        data=Data(datasets=datasets, chat_template="chatml", max_length=64),
        optim=Optim(lr=1e-4, max_steps=3),
        runtime=Runtime(output_dir=Path(f"{HOME}/runs/x")),
    )
    return {
        "mmft": "0.1.0", "model": config.model.model_dump(mode="json"), "chat_template": "chatml",
        "config": decides_weights(config), "files": {}, **more,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """What a run of three steps, resumed once and killed in the middle of a line, has written."""
    log = """2026-01-01 10:00:00,000 INFO tokenising 2 dataset(s) into /home/ming-the-person/.cache/tokens-1
2026-01-01 10:00:00,000 INFO 9 samples, 90 tokens (9 trained), 9 images; longest 10 tokens
dropped 1 of 10 records: 1 image not found
2026-01-01 11:00:00,000 INFO going on from /home/ming-the-person/runs/x/checkpoint-1
2026-01-01 11:00:00,000 INFO 95 samples, 9,300 tokens (2,100 trained), 95 images; longest 60 tokens
dropped 5 of 100 records: 4 image not found, 1 no answer in /home/ming-the-person/data/mine.json
repaired 2 of 100 records: 2 answer before the first question
2026-01-01 11:00:00,000 INFO part  parameters
"""
    lines = [
        {"step": 1, "epoch": 0.3, "loss": 2.5, "seconds": 60, "memory_gb": 3.0},
        {"step": 2, "validation_loss": 1.25, "perplexity": 3.49},
        {"step": 2, "epoch": 0.6, "loss": None, "seconds": 3600, "memory_gb": None},
        {"step": 3, "validation_loss": 1.5, "perplexity": 4.48},
        {"step": 3, "epoch": 1.0, "loss": 0.5, "seconds": 5400, "memory_gb": 2.0},
    ]
    (tmp_path / "run.log").write_text(log, "utf-8")
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"ste', "utf-8")
    return tmp_path


def card(
    kind="run", content=None, run=None, parity=None, wishes=None, names=(), *, hub="huggingface", **options
) -> str:
    wishes = wishes or Wishes()
    facts = gather(kind, Path("nowhere"), manifest() if content is None else content, run, parity, wishes, names)
    return write_card(facts, wishes, "ming/My-LLaVA", hub, **{"unverified": False} | options)


def data(text: str) -> ModelCardData:
    """The front matter as the hub's own client reads it."""
    return ModelCard(text).data


def test_the_front_matter_is_what_hubs_read():
    wishes = Wishes(license="Apache-2.0", languages=("zh", "en"), bases={"llm": "acme/base-1b"})
    found = data(card(names=["llm_adapter/adapter_config.json"], wishes=wishes))
    assert found.base_model == ["acme/base-1b", "openai/clip-vit-large-patch14-336"]
    assert found.to_dict()["base_model_relation"] == "adapter"
    assert (found.datasets, found.language, found.license) == (["acme/chats"], ["zh", "en"], "apache-2.0")
    assert (found.library_name, found.pipeline_tag) == ("mmft", "image-text-to-text")
    assert found.tags == ["mmft", "llava", "lora"]


@pytest.mark.parametrize(
    ("kind", "names", "relation", "library"),
    [
        ("run", ["llm_adapter/adapter_config.json"], "adapter", "mmft"),
        ("run", ["llm/model.safetensors"], "finetune", "mmft"),
        ("merged", ["llm/model.safetensors"], "finetune", "mmft"),
        ("hf", ["model.safetensors"], "finetune", "transformers"),
        ("gguf", ["model-f16.gguf", "mmproj-f16.gguf"], "finetune", "gguf"),
        ("gguf", ["model-Q4_0.gguf", "mmproj-f16.gguf"], "quantized", "gguf"),
    ],
)
def test_what_it_is_to_its_base_models(kind, names, relation, library):
    found = data(card(kind, names=names, parity=PARITY))
    assert (found.to_dict()["base_model_relation"], found.library_name) == (relation, library)


def test_a_model_without_eyes_is_no_llava():
    found = data(card(content=manifest(sees=False)))
    assert found.pipeline_tag == "text-generation" and "llava" not in found.tags


def test_a_base_model_with_only_a_path_is_named_but_not_linked():
    text = card()
    assert data(text).base_model == ["openai/clip-vit-large-patch14-336"]
    assert "| language model | base-1b | not pinned |" in text
    assert "mmft chat My-LLaVA --llm path/to/base-1b --image picture.jpg" in text
    assert data(card(content=manifest(sees=False))).to_dict().keys() & {"base_model", "base_model_relation"} == set()


def test_a_folder_above_the_model_is_no_name_on_a_hub(tmp_path):
    (tmp_path / "models" / "base-1b").mkdir(parents=True)
    content, wishes = manifest(sees=False, llm=LLM(path="models/base-1b", trainable=True)), Wishes()
    facts = [
        gather("run", folder, content, None, None, wishes, []) for folder in (tmp_path / "work_dirs" / "x", Path("/x"))
    ]
    assert [base.hub_id for one in facts for base in one.bases] == [None, "models/base-1b"]


def test_the_revision_of_a_base_model_is_told():
    content = manifest(llm=LLM(path="acme/base-1b", revision="v1.5", trainable=True))
    assert "| language model | acme/base-1b | v1.5 |" in card(content=content)
    cached = manifest(llm=LLM(path=f"{HOME}/hub/models--acme--base-1b/snapshots/0a1b", trainable=True))
    assert "| language model | acme/base-1b | 0a1b |" in card(content=cached)


def test_a_licence_the_hub_does_not_know_is_other_with_its_name():
    found = data(card(wishes=Wishes(license="InternLM License (2024)"))).to_dict()
    assert (found["license"], found["license_name"]) == ("other", "internlm-license-2024")


def test_without_a_licence_none_is_claimed():
    text = card()
    assert "license" not in data(text).to_dict() and "None was given." in text
    assert "The licences of base-1b and openai/clip-vit-large-patch14-336 apply as well" in text


def test_metrics_are_those_of_the_run(run):
    text = card(run=run)
    for line in (
        "| steps | 3 |", "| epochs | 1 |", "| loss, first → last | 2.5000 → 0.5000 |", "| time | 1.5 h |",
        "| validation loss, best | 1.2500 |", "| perplexity there | 3.49 |", "| memory at its highest | 3.0 GB |",
    ):  # fmt: skip
        assert line in text


def test_counts_and_drops_are_those_of_the_last_start(run):
    text = card(run=run)
    assert "- 95 samples, 9,300 tokens (2,100 trained), 95 images; longest 60 tokens" in text
    assert "- dropped 5 of 100 records: 4 image not found, 1 no answer in mine.json" in text
    assert "- repaired 2 of 100 records: 2 answer before the first question" in text
    assert "| mine.json | llava | limit 100 |" in text and "| acme/chats | messages | all |" in text
    assert "9 samples, 90 tokens" not in text


def test_what_no_file_says_is_left_out():
    text = card()
    for words in ("loss", "samples", "Compared with", "None |", "nan", "undefined"):
        assert words not in text
    bare = card("hf", {}, parity=PARITY)
    assert "A language model, trained with mmft.\n" in bare
    assert "Not recorded in these files." in bare and "## Data" not in bare and "## Training" not in bare


def test_what_was_trained_and_with_what_config(run):
    text = card(run=run)
    assert "Trained: QLoRA (nf4) r=8 alpha=16; projector mlp2x_gelu. Chat template: `chatml`." in text
    assert "  lr: 0.0001\n" in text and "max_steps: 3" in text
    assert "weight_decay" not in text and "output_dir" not in text  # defaults, and a place


def test_a_config_of_another_version_is_left_out_whole():
    content = manifest()
    content["config"]["optim"]["of_tomorrow"] = 1
    assert "```yaml" not in card(content=content)


@pytest.mark.parametrize("kind", ["run", "merged", "hf", "gguf"])
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_no_card_names_a_place_of_this_machine(run, kind, language, hub):
    parity = PARITY | {"verified": False, "refusal": f"see {HOME}/out/parity.json"}
    wishes = Wishes(card_language=language)
    text = card(kind, run=run, parity=parity, wishes=wishes, hub=hub, unverified=True)
    assert "ming-the-person" not in text and str(run) not in text and "/home" not in text
    assert "\n\n\n" not in text and "{{" not in text and "{%" not in text


def test_the_numbers_of_the_comparison_are_told():
    text = card("hf", parity=PARITY)
    assert (
        "2 probes went through both, 1 with the same greedy answer; logits differ by at most 2.0e-02 of their size "
        "(0.05 is allowed), in bfloat16." in text
    )


def python_in(text: str) -> str:
    return text.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_the_python_in_the_card_is_python(sees, hub):
    code = python_in(card("hf", manifest(sees=sees), parity=PARITY, hub=hub))
    compile(code, "card", "exec")
    assert ("snapshot_download" in code) == (hub == "modelscope")
    assert ("AutoProcessor" in code) == sees


def test_each_form_says_how_to_open_it():
    names = ["model-Q4_0.gguf", "mmproj-f16.gguf", "Modelfile"]
    text = card("gguf", parity=PARITY, names=names)
    assert "llama-mtmd-cli -m My-LLaVA/model-Q4_0.gguf --mmproj My-LLaVA/mmproj-f16.gguf --image picture.jpg" in text
    assert "ollama create my-llava -f Modelfile" in text
    text = card("gguf", manifest(sees=False), parity=PARITY, names=["model-f16.gguf"])
    assert "llama-cli -m My-LLaVA/model-f16.gguf" in text and "ollama" not in text
    assert "modelscope download --model ming/My-LLaVA" in card(hub="modelscope")
    assert "hf download ming/My-LLaVA" in card("merged", parity=PARITY)


def test_the_chinese_card_has_the_same_tables(run):
    english, chinese = card(run=run), card(run=run, wishes=Wishes(card_language="zh"))
    assert "## 训练" in chinese and "| 损失，首步 → 末步 | 2.5000 → 0.5000 |" in chinese
    assert chinese.count("|") == english.count("|") and chinese.count("```") == english.count("```")
    assert chinese.count("\n## ") == english.count("\n## ")
