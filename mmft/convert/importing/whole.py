"""Whole LLaVA models of others, taken apart: LLaVA-1.5's own checkpoints, and transformers' (the llava-hf models).

The result is a model folder whose parts any program opens: `llm/` is a plain language model, `vision_encoder/` a plain
vision model, and a config of ours goes on from them by their paths. Layouts: haotian-liu/LLaVA@c121f04
llava/model/llava_arch.py; huggingface/transformers@v5.23 models/llava, and the hub's spelling of version 4.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from mmft.config import LLM, Model, use
from mmft.convert.importing.apart import VISION_FOLDER, Whole, take_apart
from mmft.convert.importing.importers import write_imported
from mmft.convert.importing.prove import prove
from mmft.convert.importing.read import is_model
from mmft.convert.parity import proved
from mmft.convert.place import refuse_out
from mmft.errors import CheckpointError, MmftError, ModelError
from mmft.hub import HUGGINGFACE, failed, load_tokenizer, looks_like_path, missing
from mmft.inference import PRECISIONS, user_message
from mmft.modeling.build import LLM_FOLDER, PROJECTOR
from mmft.plugins import Plugins
from mmft.types import Conversation

OWN, HF = "mm_vision_tower", "vision_config"  # what config.json of either kind has, and no other's
# LLaVA's classes are their language models' with more keys in the config.
CLASSES = {"LlavaLlamaForCausalLM": "llama", "LlavaMistralForCausalLM": "mistral", "LlavaQwenForCausalLM": "qwen2"}
OWN_KEYS = re.compile(
    r"mm_.*|image_.*|tune_.*|tokenizer_.*|(un)?freeze_mm_.*|use_mm_proj|_name_or_path|architectures|model_type|auto_map"
    r"|transformers_version"
)
OWN_PLACES = ((r"model\.mm_projector\.", "projector", ""), (r"model\.vision_tower\.vision_tower\.", "vision", ""))
HF_PLACES = (
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "projector", "0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "projector", "2."),
    (r"(?:model\.)?vision_tower\.", "vision", ""),
    (r"language_model\.lm_head\.", "llm", "lm_head."),
    (r"language_model\.model\.", "llm", "model."),
    (r"model\.language_model\.", "llm", "model."),
)


def is_whole(source: Path) -> bool:
    """Whether a folder holds a whole LLaVA model, of either layout."""
    return source.is_dir() and is_model(source) and bool({OWN, HF} & _config(source).keys())


def found_source(source: Path) -> Path:
    """A path that is there, or the folder of a model that the Hugging Face hub has under this name."""
    if source.exists() or looks_like_path(str(source)) or len(source.parts) != 2:
        return source
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source)))
    except (OSError, ValueError) as error:
        raise CheckpointError(missing("SOURCE", source, HUGGINGFACE, error)) from error


def _config(source: Path) -> dict[str, Any]:
    try:
        content = json.loads((source / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{source / 'config.json'}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}


def bring_whole(
    source: Path,
    out: Path,
    *,
    plugins: Plugins,
    chat_template: str | None = None,
    vision_encoder: str | None = None,
    device: torch.device | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Take a model apart into the model folder `out`; returns lines that say how a config goes on from it.

    A llava-hf model is run by transformers beside the result, on `device`, and `parity.json` has the numbers. Raises
    `CheckpointError` where the model has what mmft has not, or weights are missing or left over, `ParityError` where
    the result answers otherwise.
    """
    if chat_template:
        plugins.chat_templates.get(chat_template)  # raises for an unknown name, before a weight is read
    sources = (source, vision_encoder)
    refuse_out(out, sources, overwrite=overwrite)
    content = _config(source)
    read = _read_own if OWN in content else _read_hf
    whole = read(source, content, vision_encoder)
    with proved(out, overwrite=overwrite, sources=sources) as folder:
        model, dtype = take_apart(whole, folder, plugins)
        template = chat_template or _template_of(folder, plugins)
        precision = next((name for name, known in PRECISIONS.items() if known is dtype), "fp32")
        if OWN not in content:
            where = device or torch.device("cpu")
            whole.lines.append(prove(source, model, template, dtype, where, plugins, folder, out))
        else:
            whole.lines.append("not run beside LLaVA's own code: every weight has its place, by name and shape")
        write_imported(folder, _moved(model, folder, "."), template, precision, plugins)
    assert model.vision is not None
    final = _moved(model, folder, str(out.resolve()))
    assert final.vision is not None
    options = ", ".join(f"{key}={value!r}" for key, value in final.vision.encoder.options.items())
    return [
        f'{out / LLM_FOLDER}: the language model; go on from it with path="{out / LLM_FOLDER}"',
        f'the vision encoder: use("{final.vision.encoder.name}", {options})',
        f'{out / PROJECTOR}: {final.vision.projector.name}; use it with projector_weights=Path("{out}")',
        *whole.lines,
        f"{out} is a model folder with the chat template {template}: mmft chat {out}",
    ]


def _read_own(source: Path, content: dict[str, Any], encoder: str | None) -> Whole:
    """LLaVA's own layout: a language model's files with more keys and weights; the encoder by name."""
    from transformers import AutoConfig

    architecture = str((content.get("architectures") or [""])[0])
    if architecture not in CLASSES:
        raise CheckpointError(
            f"{source} is a {architecture or 'model without a class'}; mmft reads {', '.join(CLASSES)}"
        )
    wanted: dict[str, tuple[Any, ...]] = {
        "mm_patch_merge_type": (None, "flat"),
        "mm_vision_select_feature": (None, "patch"),
        "mm_use_im_start_end": (None, False),
        "image_aspect_ratio": (None, "pad", "square"),
    }
    for key, allowed in wanted.items():
        if content.get(key) not in allowed:
            raise CheckpointError(
                f"{source}: {key} is {content[key]!r}; mmft has {' or '.join(map(repr, allowed[1:]))}"
            )
    text = AutoConfig.for_model(
        CLASSES[architecture], **{key: value for key, value in content.items() if not OWN_KEYS.fullmatch(key)}
    )
    named = encoder or str(content[OWN])
    vision_config, processor = _encoder_files(named, "--vision-encoder")
    return Whole(
        source=source,
        places=OWN_PLACES,
        text=text,
        encoder=named,
        select_layer=int(content.get("mm_vision_select_layer", -2)),
        pad_to_square=content.get("image_aspect_ratio") == "pad",
        image_processor=processor,
        vision_config=vision_config,
    )


def _read_hf(source: Path, content: dict[str, Any], encoder: str | None) -> Whole:
    """transformers' layout: one config with two inside it, one processor for texts and pictures."""
    from transformers import AutoConfig, LlavaConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(failed("SOURCE", source, HUGGINGFACE, error)) from error
    if not isinstance(config, LlavaConfig):
        raise CheckpointError(
            f"{source} is a model of type {content.get('model_type')}; mmft reads LLaVA-1.5's, 'llava'"
        )
    if encoder:
        raise CheckpointError(f"{source} holds its vision encoder; leave --vision-encoder out")
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    wanted = {
        "vision_feature_layer": (layers, len(layers) == 1, "one layer"),
        "projector_hidden_act": (config.projector_hidden_act, config.projector_hidden_act == "gelu", "'gelu'"),
        "multimodal_projector_bias": (config.multimodal_projector_bias, config.multimodal_projector_bias, "True"),
    }
    for key, (value, fits, allowed) in wanted.items():
        if not fits:
            raise CheckpointError(f"{source}: {key} is {value!r}; mmft has {allowed}")
    text = config.text_config
    text.tie_word_embeddings = bool(config.tie_word_embeddings)
    _, processor = _encoder_files(str(source), "SOURCE")
    pads = bool(getattr(processor, "do_pad", False))
    return Whole(
        source=source,
        places=HF_PLACES,
        text=text,
        encoder="",
        select_layer=int(layers[0]),
        pad_to_square=pads,
        image_processor=processor,
        vision_config=config.vision_config,
        prefix_tokens={"default": 1, "full": 0}[config.vision_feature_select_strategy],
    )


def _encoder_files(path: str, option: str) -> tuple[Any, Any]:
    """Vision config and image processor of a folder or name."""
    from transformers import AutoConfig, AutoImageProcessor

    try:
        config = AutoConfig.from_pretrained(path)
        processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(failed(option, path, HUGGINGFACE, error)) from error
    return getattr(config, "vision_config", config), processor


def _template_of(folder: Path, plugins: Plugins) -> str:
    """The tokenizer's own where mmft can train with it, pictures included; else that of LLaVA-1.5."""
    tokenizer = load_tokenizer(LLM(path=str(folder / LLM_FOLDER)))
    asked = Conversation((user_message("What is it?", ["a.png"]),))
    try:
        plugins.chat_templates.get("auto").for_tokenizer(tokenizer).render(asked, generation_prompt=True)
    except MmftError:
        return "vicuna"
    return "auto"


def _moved(model: Model, old: Path, new: str) -> Model:
    """The model by the places its parts will have; `.` means beside the manifest."""
    assert model.vision is not None
    options = dict(model.vision.encoder.options)
    if options["path"] == str(old / VISION_FOLDER):
        options["path"] = f"{new}/{VISION_FOLDER}"
    encoder = use(model.vision.encoder.name, **options)
    return model.model_copy(
        update={
            "llm": model.llm.model_copy(update={"path": f"{new}/{LLM_FOLDER}"}),
            "vision": model.vision.model_copy(update={"encoder": encoder}),
        }
    )
