"""The parts of a trained model as plain modules: adapters merged into the weights, 4-bit and 8-bit weights unpacked.

An adapter that was trained on a quantised base goes onto what that base really computed with, the dequantised weights:
merged into the original ones it would be another model.
"""

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmft.config import LLM, Model
from mmft.data.records import bound_template
from mmft.data.shape import Shape, describe_model
from mmft.errors import ModelError
from mmft.hub import encoder_options
from mmft.inference import PRECISIONS
from mmft.modeling.build import ADAPTER, LLM_FOLDER, PROJECTOR, VISION_ADAPTER, VISION_WEIGHTS, load_exactly
from mmft.modeling.checkpoint import Manifest, as_trained, read_manifest
from mmft.modeling.llm import base_token_ids, load_llm, quantized_layers
from mmft.modeling.lora import add_lora
from mmft.plugins import Plugins
from mmft.specs import ChatTemplate

M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Parts:
    """A trained model without adapters. `vision` and `projector` are None in a text model; `dtype` is that of all."""

    manifest: Manifest
    model: Model
    shape: Shape
    template: ChatTemplate
    dtype: torch.dtype
    llm: Any
    vision: nn.Module | None
    projector: nn.Module | None

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and the template's where they are one token."""
        return stop_ids(self.template, self.shape)


def stop_ids(template: ChatTemplate, shape: Shape) -> list[int]:
    """See `Parts.stop_ids`."""
    encoded = [shape.tokenizer.encode([text])[0].tolist() for text in template.stop]
    eos = shape.tokenizer.eos_id
    return sorted({*(ids[0] for ids in encoded if len(ids) == 1), *([eos] if eos is not None else [])})


def load_parts(
    folder: Path, plugins: Plugins, *, dtype: str | None, device: torch.device, llm: str | None = None
) -> Parts:
    """Read a model folder and merge. `dtype` is that of the result, as in `runtime.precision`; None: as it was trained.

    `llm` is where the base model is now. Raises `CheckpointError` for a damaged folder, `ModelError` without a base.
    """
    manifest = read_manifest(folder)
    plugins = as_trained(folder, manifest, plugins)
    model = manifest.model
    if llm is not None:
        model = model.model_copy(update={"llm": model.llm.model_copy(update={"path": llm})})
    shape = describe_model(model, plugins, folder)
    wanted = PRECISIONS[dtype or manifest.precision]
    language = merged_llm(model, folder, trained_in=PRECISIONS[manifest.precision], dtype=wanted, device=device)
    vision = projector = None
    if model.vision:
        assert shape.vision is not None
        vision = _merged_vision(model, plugins, folder).to(device, wanted).eval()
        width = language.get_input_embeddings().weight.shape[1]
        options = model.vision.projector.options
        projector = plugins.projectors.get(model.vision.projector.name).build(
            shape.vision.hidden_size, width, **options
        )
        load_exactly(projector, folder / PROJECTOR)
        projector.to(device, wanted).eval()
    template = bound_template(manifest.chat_template, plugins, shape.tokenizer)
    return Parts(manifest, model, shape, template, wanted, language, vision, projector)


def merged_llm(model: Model, folder: Path, *, trained_in: torch.dtype, dtype: torch.dtype, device: torch.device) -> Any:
    """The language model of a folder as transformers has it, in `dtype`. `trained_in` is what a quantised one used.

    A quantised one is packed from the base in `dtype`, as the trained model is that it is compared with, or in float32
    where it was trained so. From the base in a third dtype some weights would fall into other bins.
    """
    own = folder / LLM_FOLDER if (folder / LLM_FOLDER).is_dir() else None
    as_base = model.llm.model_copy(update={"trainable": False})
    quantized = model.llm.quantization != "none"
    unpacked = torch.float32 if quantized and trained_in == torch.float32 else dtype
    llm = load_llm(as_base, dtype=unpacked, device=device, path=own, hub=model.hub)
    dequantize(llm, dtype)
    if model.llm.lora:
        llm = _merge_adapter(llm, model.llm, folder / ADAPTER, model.hub)
    llm.requires_grad_(False)
    llm.config.use_cache = True
    return llm.eval()


def _merge_adapter(llm: Any, config: LLM, adapter: Path, hub: str) -> Any:
    """Matrices, magnitudes and rows of new tokens into the weights, layer by layer."""
    assert config.lora is not None
    _give_back_at_once()
    # saved as a plain adapter whatever it started from, so nothing has to be taken out of the base first
    lora = config.lora.model_copy(update={"init": "default"})
    adapted = add_lora(llm, lora, weights=adapter, causal_lm=True, new_tokens=base_token_ids(config, hub))
    return adapted.merge_and_unload(safe_merge=True)


def _give_back_at_once() -> None:
    """Have glibc map blocks of 1 MB and more one by one, so that a freed one goes back at once.

    By itself it keeps freed blocks of up to 32 MB for later. What merging frees lies between the merged weights then,
    and stays: a third of the model, measured (benchmarks/convert.py).
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):  # musl has none
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _merged_vision(model: Model, plugins: Plugins, folder: Path) -> Any:
    """The encoder in float32, with what was trained of it."""
    assert model.vision is not None
    encoder: Any = plugins.vision_encoders.get(model.vision.encoder.name).build(
        **encoder_options(model.vision.encoder, plugins, model.hub)
    )
    encoder.requires_grad_(False)
    if (folder / VISION_WEIGHTS).is_file():
        load_exactly(encoder, folder / VISION_WEIGHTS)
    if model.vision.lora:
        lora = model.vision.lora.model_copy(update={"init": "default"})
        encoder = add_lora(encoder, lora, weights=folder / VISION_ADAPTER).merge_and_unload(safe_merge=True)
    return encoder.requires_grad_(False)


@torch.no_grad()
def dequantize(llm: Any, dtype: torch.dtype) -> None:
    """Put ordinary linear layers in the places of quantised ones, one at a time, and everything in `dtype`."""
    packed = {id(layer) for layer in quantized_layers(llm)}
    if packed:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        for name, layer in [item for item in llm.named_modules() if id(item[1]) in packed]:
            weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(dtype)
            plain = nn.Linear(1, 1, bias=layer.bias is not None, device="meta")
            plain.in_features, plain.out_features = weight.shape[1], weight.shape[0]
            plain.weight = nn.Parameter(weight, requires_grad=False)
            plain.bias = layer.bias
            llm.set_submodule(name, plain)
            del layer
        llm.hf_quantizer, llm.is_quantized = None, False
        llm.is_loaded_in_4bit = llm.is_loaded_in_8bit = False
        del llm.config.quantization_config
        gc.collect()
    for parameter in llm.parameters():  # not `llm.to`, which would round the frequencies of the positions too
        parameter.data = parameter.data.to(dtype)
    llm.config.dtype = dtype


def check_logits(llm: Any, ids: Tensor) -> None:
    """Raise `ModelError` where a model does more than its head's product to the logits: composed anew, it would not."""
    with torch.no_grad():
        whole = llm(input_ids=ids, use_cache=False).logits
        hidden = getattr(llm, llm.base_model_prefix)(input_ids=ids, use_cache=False)[0]
        bare = llm.get_output_embeddings()(hidden)
    if not torch.equal(whole, bare):
        raise ModelError(
            f"{type(llm).__name__} caps or scales its logits, and transformers' LLaVA class has no place for that; "
            "use `mmft convert merge`, whose llm/ folder is the whole language model"
        )


def base_class_is_kept(llm: Any, composed: Any) -> bool:
    """Whether composing a model from the config gives the class that this language model has inside."""
    return type(getattr(llm, llm.base_model_prefix)) is type(composed)
