"""What a card and the advice say of models that were converted, merged or imported, and of encoders alone."""

import json

import pytest
from huggingface_hub import ModelCard
from push_models import HOME, VERIFIED, be_somebody, converted, finished_run, manifest, plan, staged, write

from mmft.convert.push.model_card import Wishes
from mmft.modeling.checkpoint import read_manifest


@pytest.fixture(autouse=True)
def somebody(monkeypatch):
    be_somebody(monkeypatch)


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path)


def gguf(folder, parity):
    write(folder / "model-f16.gguf", b"GGUF" + bytes(64))
    write(folder / "mmproj-f16.gguf", b"GGUF" + bytes(64))
    write(folder / "parity.json", parity)
    return folder


def merged(folder, *, source=None):
    """As `mmft convert merge` leaves it: its language model in llm/, named so."""
    write(folder / "llm" / "config.json", {"model_type": "llama"})
    write(folder / "llm" / "model.safetensors", b"weights")
    write(folder / "projector.safetensors", b"weights")
    manifest(folder)
    content = json.loads((folder / "mmft.json").read_text("utf-8"))
    content["merged"] = {"llm": content["model"]["llm"]["path"], "quantization": "nf4"}
    content["model"]["llm"] = {"path": "./llm", "quantization": "none", "lora": None, "revision": None}
    write(folder / "mmft.json", content)
    write(folder / "parity.json", VERIFIED | ({"source": str(source)} if source else {}))
    return folder


def imported(folder):
    """As `mmft convert import` leaves a whole LLaVA: no config, every part beside the manifest."""
    for part in ("llm", "vision_encoder"):
        write(folder / part / "config.json", {"model_type": "x"})
        write(folder / part / "model.safetensors", b"weights")
    write(folder / "projector.safetensors", b"weights")
    model = {
        "llm": {"path": "./llm", "quantization": "none", "lora": None, "revision": None},
        "vision": {
            "encoder": {"use": "clip", "path": "./vision_encoder"}, "projector": {"use": "mlp2x_gelu"},
            "projector_trainable": False,
        },
    }  # fmt: skip
    manifest(folder, model=model, config={})
    return folder


@pytest.mark.parametrize("make", [converted, gguf], ids=["hf", "gguf"])
@pytest.mark.parametrize("named", ["run", "final", "relative"])
def test_a_conversion_finds_the_run_it_was_made_from(tmp_path, run, make, named, monkeypatch):
    source = {"run": run, "final": run / "final", "relative": "work_dirs/run/final"}[named]
    out = make(tmp_path / "out", VERIFIED | {"source": str(source)})
    planned = plan(out)
    assert "| language model | base-1b |" in planned.card and "| loss, first → last | 2.0000 → 1.0000 |" in planned.card
    assert "| acme/chats | messages |" in planned.card and "```yaml" in planned.card
    assert not [note for note in planned.notes if "--run" in note]
    folder = staged(planned, tmp_path)
    for path in folder.rglob("*"):
        assert b"work_dirs" not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize("source", ["gone", "other", "", None, 3])
def test_a_source_that_is_gone_or_no_model_of_ours_is_no_error(tmp_path, source):
    write(tmp_path / "other" / "config.json", {"model_type": "llava"})
    planned = plan(converted(tmp_path / "out", VERIFIED | {"source": source}))
    assert "Not recorded in these files." in planned.card
    assert any("name the run with --run" in note for note in planned.notes)


def test_a_merged_model_has_the_metrics_of_its_source_and_so_has_what_is_made_of_it(tmp_path, run):
    folder = merged(tmp_path / "elsewhere" / "merged", source=run / "final")
    pair = gguf(tmp_path / "pair", VERIFIED | {"source": str(folder)})
    for model in (folder, pair):
        assert "| loss, first → last | 2.0000 → 1.0000 |" in plan(model).card
    assert "2.0000 → 1.0000" in plan(merged(tmp_path / "other"), run=str(run)).card


def test_a_merged_model_needs_no_base_language_model(tmp_path):
    folder = merged(tmp_path / "merged")
    planned = plan(folder)
    (note,) = [note for note in planned.notes if "base-1b" in note]
    assert note.endswith("so the card has no link to it; its name on the hub: --base-model OWNER/NAME")
    named = plan(folder, wishes=Wishes(bases={"llm": "acme/base-1b"}))
    assert ModelCard(named.card).data.base_model == ["acme/base-1b", "acme/clip"]
    content = json.loads((staged(named, tmp_path) / "mmft.json").read_text("utf-8"))
    assert content["model"]["llm"]["path"] == "./llm" and content["merged"]["llm"] == "acme/base-1b"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_an_imported_model_is_whole_and_its_parts_keep_their_names(tmp_path, language):
    folder = imported(tmp_path / "llava")
    planned = plan(folder, wishes=Wishes(card_language=language))
    assert not any("place on this disk" in note or "metrics" in note for note in planned.notes)
    assert any("--base-model" in note for note in planned.notes)
    assert "--llm" not in planned.card and "own repositor" not in planned.card and "各自的仓库" not in planned.card
    whole = "This repository holds the whole model." if language == "en" else "仓库中是完整的模型。"
    assert whole in planned.card and "trained with mmft" not in planned.card and "使用 mmft 训练" not in planned.card
    wishes = Wishes(card_language=language, bases={"llm": "acme/llava", "vision": "acme/clip"})
    named = plan(folder, wishes=wishes)
    assert ModelCard(named.card).data.base_model == ["acme/llava", "acme/clip"]
    assert whole in named.card and "--llm" not in named.card
    model = read_manifest(staged(named, tmp_path)).model
    assert model.llm.path.endswith("/llm") and "acme" not in model.llm.path


def test_an_imported_model_whose_encoder_is_on_a_hub_says_what_it_holds(tmp_path):
    folder = imported(tmp_path / "llava")
    content = json.loads((folder / "mmft.json").read_text("utf-8"))
    content["model"]["vision"]["encoder"]["path"] = "acme/clip"
    write(folder / "mmft.json", content)
    card = plan(folder).card
    assert "holds the language model and the projector; the vision encoder is loaded from its own repository." in card
    assert "--llm" not in card and ModelCard(card).data.base_model == ["acme/clip"]


def test_a_folder_that_only_training_was_told_with_a_dot_is_not_in_the_model(tmp_path, run):
    content = json.loads((run / "final" / "mmft.json").read_text("utf-8"))
    for tree in (content, content["config"]):
        tree["model"]["llm"]["path"] = "./models/base-1b"
    write(run / "final" / "mmft.json", content)
    planned = plan(run)
    assert "--llm path/to/base-1b" in planned.card
    assert any("'base-1b' is known only by its place on this disk, so others cannot" in note for note in planned.notes)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_an_encoder_alone_gets_the_card_of_an_encoder(tmp_path, language, hub):
    from mmft.convert.push.push import plan_push

    folder = tmp_path / "clip"
    config = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "hidden_size": 1024}
    write(folder / "config.json", config)
    write(folder / "preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"})
    write(folder / "model.safetensors", b"weights")
    write(folder / "parity.json", VERIFIED | {"source": f"{HOME}/adapters/clip"})
    wishes = Wishes(card_language=language, bases={"vision": "acme/clip"})
    card = plan_push(str(folder), "ming/mine", hub, wishes=wishes).card
    data = ModelCard(card).data
    assert (data.pipeline_tag, data.library_name) == ("image-feature-extraction", "transformers")
    assert data.base_model == ["acme/clip"] and data.tags == ["mmft"]
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "AutoModel.from_pretrained" in code and "AutoImageProcessor" in code and "CausalLM" not in code
    assert ("snapshot_download" in code) == (hub == "modelscope")
    for words in ("anguage model", "语言模型", "greedy", "贪心", "trained with mmft", "使用 mmft 训练"):
        assert words not in card
    assert any("--base-vision" in note for note in plan(folder).notes)
