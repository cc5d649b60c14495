"""Part 2 of an XTuner config, its `model`, as our `Model`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmft.convert.xtuner.names import ENCODERS, NATIVE, OTHER_METHODS, image_tokens
from mmft.convert.xtuner.report import Node, Report, shown
from mmft.convert.xtuner.syntax import Named
from mmft.convert.xtuner.write import Arg, Call, Raw, path_of
from mmft.errors import ConfigError, Problem

# bitsandbytes settings that are the same here, or only matter for what is not offered
QUANTIZATION_SAME = (
    "llm_int8_threshold",
    "llm_int8_has_fp16_weight",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
)
LLM_SAME = ("torch_dtype", "dtype", "device_map", "low_cpu_mem_usage", "use_safetensors", "use_cache")
LORA_SAME = ("task_type", "inference_mode", "fan_in_fan_out")


@dataclass
class ModelDraft:
    """The `Model(...)` to write, the settings above it, and what other parts want to know of it."""

    call: Call
    settings: dict[str, Any] = field(default_factory=dict)
    is_llava: bool = False
    image_tokens: int | None = None  # of one picture; None without an encoder, or where its name does not say
    checkpointing: bool = True
    trains_projector: bool = False
    trains_vision: bool = False


def draft_model(top: Node, pad_to_square: bool | None, report: Report) -> ModelDraft:
    """Raises `ConfigError` for a model or a method that mmft has not."""
    model = top.node("model")
    if model is None:
        if top.values.get("trainer") or top.values.get("framework"):
            what = "trains with the Trainer of transformers, which describes no model for XTuner"
        else:
            what = "has no `model`"
        raise ConfigError([Problem("model", what, "give a config of SupervisedFinetune or LLaVAModel")])
    if model.kind in OTHER_METHODS:
        hint = "mmft converts SupervisedFinetune and LLaVAModel"
        raise ConfigError([Problem("model", f"{model.kind} is {OTHER_METHODS[model.kind]}", hint)])
    if model.kind not in ("SupervisedFinetune", "LLaVAModel"):
        hint = "mmft converts SupervisedFinetune and LLaVAModel"
        raise ConfigError([Problem("model", f"{model.kind or 'a model without a type'} is not known", hint)])
    is_llava = model.kind == "LLaVAModel"
    settings: dict[str, Any] = {}
    lora = _lora(model, "llm_lora" if is_llava else "lora", report)
    frozen = bool(model.take("freeze_llm", False)) if is_llava else False
    llm, path = _llm(model, lora, trainable=lora is None and not frozen, report=report)
    settings["LLM_PATH"] = path
    draft = ModelDraft(Call("Model", llm=llm), settings, is_llava)
    if is_llava:
        vision = _vision(model, draft, pad_to_square, report)
        draft.call = Call("Model", llm=llm, vision=vision)
    draft.checkpointing = bool(model.take("use_activation_checkpointing", True))
    if (positions := model.take("max_position_embeddings")) is not None:
        report.edit(
            f"model.max_position_embeddings = {positions}: mmft does not stretch positions; "
            "set rope_scaling in the config.json of a local copy of the model"
        )
    if model.take("tokenizer") is not None:
        report.edit("model.tokenizer: resizes the embeddings; name the new tokens in model.llm.new_tokens")
    if (peft := model.take("peft_model")) is not None:
        report.edit(f"model.peft_model = {shown(peft)}: put the adapter's folder into model.llm.adapter")
    model.close(same=("use_varlen_attn", "lora", "llm_lora"))
    return draft


def _llm(model: Node, lora: Call | None, *, trainable: bool, report: Report) -> tuple[Call, str]:
    llm = model.node("llm")
    path = llm.take("pretrained_model_name_or_path") if llm else None
    if llm is None or not isinstance(path, str):
        raise ConfigError([Problem("model.llm", f"names no model: {shown(path)}", "it needs a path or a hub id")])
    remote = bool(llm.take("trust_remote_code", False)) and not NATIVE.match(path)
    attention = llm.take("attn_implementation")
    quantization = _quantization(llm)
    llm.close(same=LLM_SAME)
    written = Call(
        "LLM",
        path=Raw("LLM_PATH"),
        quantization=quantization if quantization != "none" else None,
        lora=lora,
        trainable=trainable or None,
        attention=attention if attention in ("sdpa", "eager") else None,
        trust_remote_code=remote or None,
        revision=llm.values.get("revision"),
    )
    if trainable and quantization != "none":
        report.edit(f"model.llm: trains every weight of a model in {quantization}; give it a LoRA, or no quantisation")
    return written, path


def _quantization(llm: Node) -> str:
    """`none`, `nf4`, `fp4` or `int8`."""
    if llm.take("load_in_8bit"):
        return "int8"
    llm.take("revision")
    direct = bool(llm.take("load_in_4bit"))
    config = llm.node("quantization_config")
    if config is None:
        return "nf4" if direct else "none"
    four, eight = bool(config.take("load_in_4bit", False)), bool(config.take("load_in_8bit", False))
    kind = str(config.take("bnb_4bit_quant_type", "fp4"))
    double = config.take("bnb_4bit_use_double_quant", False)
    if four and not double:
        config.report.differ(f"{config.where('bnb_4bit_use_double_quant')} = {double}: 4-bit is always double here")
    config.close(same=QUANTIZATION_SAME)
    return "int8" if eight else kind if four else "none"


def _lora(model: Node, key: str, report: Report) -> Call | None:
    lora = model.node(key)
    if lora is None:
        return None
    if lora.kind not in ("LoraConfig", ""):
        report.edit(f"{lora.path}: {lora.kind} is not LoRA, the one adapter here")
    targets = lora.take("target_modules")
    if targets is not None and not isinstance(targets, str):
        targets = tuple(targets)
    start = lora.take("init_lora_weights", True)
    if (bias := lora.take("bias", "none")) != "none":
        report.edit(f"{lora.where('bias')} = {bias!r}: biases are not trained here")
    for name in ("modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform"):
        if (value := lora.take(name)) is not None:
            report.edit(f"{lora.where(name)} = {shown(value)}: adapters here are the same in every layer they are in")
    written = Call(
        "Lora",
        r=lora.take("r", 8),
        alpha=lora.take("lora_alpha", 8),
        dropout=lora.take("lora_dropout", 0.0),
        targets=None if targets in (None, "all-linear") else targets,
        dora=lora.take("use_dora") or None,
        rslora=lora.take("use_rslora") or None,
        init=start if isinstance(start, str) else None,
    )
    lora.close(same=LORA_SAME)
    return written


def _vision(model: Node, draft: ModelDraft, pad_to_square: bool | None, report: Report) -> Call:
    encoder = model.node("visual_encoder")
    path = encoder.take("pretrained_model_name_or_path") if encoder else None
    if encoder is None or not isinstance(path, str):
        raise ConfigError([Problem("model.visual_encoder", f"names no encoder: {shown(path)}", "it needs a path")])
    name = ENCODERS.get(encoder.kind) or next((n for n in ENCODERS.values() if n in path.lower()), "")
    if not name:
        known = ", ".join(ENCODERS.values())
        report.edit(f"model.visual_encoder: {encoder.kind} of {path} is not known; encoders: {known}")
        name = "clip"
    if name != "clip":
        report.differ(
            f"model.visual_encoder: XTuner drops the first patch of any encoder; mmft only {name}'s class token"
        )
    encoder.close(same=("trust_remote_code", *LLM_SAME))
    draft.settings["ENCODER_PATH"] = path
    draft.image_tokens = _tokens(path)
    layer, depth = model.take("visual_select_layer", -2), model.take("projector_depth", 2)
    lora = _lora(model, "visual_encoder_lora", report)
    model.take("visual_encoder_lora")
    trainable = not model.take("freeze_visual_encoder", False) and lora is None
    draft.trains_projector, draft.trains_vision = True, trainable or lora is not None
    chosen = Call("use", name, path=Raw("ENCODER_PATH"), select_layer=layer, pad_to_square=pad_to_square)
    return Call(
        "Vision",
        encoder=chosen,
        projector=Call("use", "linear" if depth == 1 else f"mlp{depth}x_gelu"),
        projector_weights=_projector_weights(model, draft, report),
        lora=lora,
        trainable=trainable or None,
    )


def _tokens(encoder: str) -> int | None:
    """Of a folder, its own configuration; of a hub id, its name."""
    if Path(encoder).is_dir():
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(encoder)
        config = getattr(config, "vision_config", config)
        return int(config.image_size // config.patch_size) ** 2
    return image_tokens(encoder)


def _projector_weights(model: Node, draft: ModelDraft, report: Report) -> Raw | None:
    """Where stage 1 leaves its projector: the `final` folder of the run that the .pth is of."""
    checkpoint = model.take("pretrained_pth")
    if checkpoint is None:
        return None
    if isinstance(checkpoint, Named) or not isinstance(checkpoint, str):
        report.edit(f"model.pretrained_pth = {shown(checkpoint)}: give the stage-1 folder as projector_weights")
        return None
    folder = Path(checkpoint).parent if checkpoint.endswith(".pth") else Path(checkpoint)
    inside = folder if folder.name else Path("work_dirs") / Path(checkpoint).stem
    brought = inside / "projector"
    command = f"mmft convert import {checkpoint} {brought}"
    draft.settings["STAGE1"] = Arg(
        "STAGE1", path_of(str(inside / "final")), f"stage 1's run by mmft; of XTuner's own .pth: {brought}"
    )
    report.differ(
        f"model.pretrained_pth = {checkpoint}: read from {inside / 'final'}, where mmft's stage 1 leaves it; to start "
        f'from XTuner\'s own projector: {command}, and set STAGE1 = Path("{brought}")'
    )
    return Raw("STAGE1")
