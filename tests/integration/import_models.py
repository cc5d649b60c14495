"""Models in the layouts of others, made with transformers' and torch's classes: what `mmft convert import` reads."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from mmft.inference import load_assistant
from mmft.modeling.attention import for_generation
from mmft.testing import CHATML, save_image_processor, tiny_tokenizer, tiny_vision

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
LLAVA_HF = (  # as llava-hf/llava-1.5-7b-hf has it: typed parts, and no control token at the end of an answer
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPELLINGS = {  # of transformers 5 in memory, of the hub's files, of transformers 5's files
    "model.vision_tower.": ("vision_tower.vision_model.", "model.vision_tower."),
    "model.multi_modal_projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "model.language_model.": ("language_model.model.", "model.language_model."),
    "lm_head.": ("language_model.lm_head.", "lm_head."),
}

XTUNER = """
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, CLIPImageProcessor, CLIPVisionModel
from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

raise RuntimeError("a config is read, not run")
llm_path = {llm!r}
clip_path = {clip!r}
prompt_template = PROMPT_TEMPLATE.vicuna
model = dict(
    type=LLaVAModel,
    freeze_llm={freeze},
    freeze_visual_encoder={freeze},
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm_path),
    {lora}
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=clip_path),
)
llava_dataset = dict(
    type=LLaVADataset, data_path="x.json", image_folder="x", dataset_map_fn=llava_map_fn, max_length=100,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template), pad_image_to_square=True,
)
train_dataloader = dict(batch_size=1, num_workers=0, dataset=llava_dataset)
"""
LORA = """llm_lora=dict(type=LoraConfig, r=4, lora_alpha=8, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"),
    visual_encoder_lora=dict(type=LoraConfig, r=2, lora_alpha=6, lora_dropout=0.05, bias="none"),"""


def text_config(folder: Path, family: str = "llama", *, tied: bool = False, template: str = CHATML):
    """A tokenizer with a token for pictures in `folder`, and the config of a language model for it."""
    tiny_tokenizer(folder, special=SPECIAL, chat_template=template)
    hf = AutoTokenizer.from_pretrained(folder)
    return AutoConfig.for_model(
        family, vocab_size=len(hf) + 5, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2,
        bos_token_id=None, eos_token_id=hf.eos_token_id, pad_token_id=hf.pad_token_id, tie_word_embeddings=tied,
    )  # fmt: skip


def llava(folder: Path, *, encoder: str = "clip", **options) -> LlavaForConditionalGeneration:
    """A random LLaVA of transformers; its tokenizer is in `folder`, its vision tower's own folder in `folder`-tower."""
    text = text_config(folder, **options)
    tower = tiny_vision(folder.with_name(f"{folder.name}-tower"), encoder)
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(tower), text_config=text, image_token_index=SPECIAL.index("<image>"),
        image_seq_length=16, vision_feature_layer=-2, tie_word_embeddings=text.tie_word_embeddings,
        vision_feature_select_strategy="default" if encoder == "clip" else "full",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():  # other than the tower's folder has
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def hf_state(model, spelling: int) -> dict[str, Tensor]:
    """The weights in the hub's spelling (0), or in that of transformers 5 (1)."""
    state = {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        prefix = next(prefix for prefix in SPELLINGS if key.startswith(prefix))
        state[SPELLINGS[prefix][spelling] + key.removeprefix(prefix)] = tensor.contiguous().clone()
    return state


def save_hf(model, folder: Path, *, spelling: int = 0, shards: int = 1, kind: str = "clip", pads: bool = False) -> Path:
    """The folder of a llava-hf model: its processor crops, as theirs do; with `pads` it makes pictures square first."""
    model.config.save_pretrained(folder)
    save_shards(hf_state(model, spelling), folder, shards)
    name = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor"}[kind]
    square = {"height": 28, "width": 28}
    save_image_processor(folder, name, size={"shortest_edge": 28} if kind == "clip" else square, crop_size=square)
    if pads:
        path = folder / "preprocessor_config.json"
        steps = json.loads(path.read_text("utf-8")) | {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        path.write_text(json.dumps(steps), "utf-8")
    return folder


def save_own(model, folder: Path, *, tower_inside: bool, pickled: bool = True, shards: int = 2, **config) -> Path:
    """The same model in LLaVA's own layout: a Llama with more keys, its encoder by name, weights in torch's pickles."""
    state = {}
    for key, tensor in model.state_dict().items():
        tensor = tensor.contiguous().clone()
        if key.startswith("model.language_model."):
            state["model." + key.removeprefix("model.language_model.")] = tensor
        elif key.startswith("lm_head."):
            state[key] = tensor
        elif key.startswith("model.multi_modal_projector."):
            index = {"1": "0", "2": "2"}[key.split("linear_")[1][0]]
            state[f"model.mm_projector.{index}.{key.rpartition('.')[2]}"] = tensor
        elif tower_inside:
            name = key.removeprefix("model.vision_tower.")
            state[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # of transformers 4.31, which made them
    content = model.config.text_config.to_dict() | {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": str(folder.with_name(f"{folder.name}-tower")), "use_mm_proj": True,
        "image_aspect_ratio": "pad", "mm_use_im_start_end": False, "tune_mm_mlp_adapter": False,
        "tokenizer_model_max_length": 2048, "freeze_mm_mlp_adapter": False, "_name_or_path": "lmsys/vicuna",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content | config), "utf-8")
    save_shards(state, folder, shards, pickled=pickled)
    return folder


def save_shards(state: dict[str, Tensor], folder: Path, shards: int, *, pickled: bool = False) -> None:
    """Every so-many-th weight in one file, with the index."""
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for number in range(shards):
        name = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{number + 1:05d}-of-{shards:05d}.{suffix}"
        part = {key: tensor for place, (key, tensor) in enumerate(state.items()) if place % shards == number}
        torch.save(part, folder / name) if pickled else save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8"
        )


def pixels_of(picture, folder: Path, *, pad: bool = False) -> Tensor:
    """float[1, 3, H, W], by transformers' own processor; `pad` as LLaVA's repository does it before."""
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    if pad:
        from PIL import Image

        side = max(picture.size)
        colour = tuple(int(value * 255) for value in processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return processor(images=picture, return_tensors="pt")["pixel_values"]


def xtuner_config(folder: Path, llm: Path, clip: Path, *, lora: bool) -> Path:
    """A LLaVA config of XTuner that would raise if it were run."""
    path = folder / "llava_tiny_finetune.py"
    path.write_text(XTUNER.format(llm=str(llm), clip=str(clip), freeze=lora, lora=LORA if lora else ""), "utf-8")
    return path


def adapted(model, rank: int, alpha: int):
    """As XTuner wraps a part, every linear layer of it."""
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.eval()


def xtuner_parts(llm: Path, clip: Path):
    """Language model, encoder and projector of a QLoRA run of XTuner, and the `state_dict` it would save."""
    torch.manual_seed(0)
    language = adapted(AutoModelForCausalLM.from_pretrained(llm), 4, 8)
    vision = adapted(CLIPVisionModel.from_pretrained(clip), 2, 6)
    projector = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.GELU(), torch.nn.Linear(32, 32))
    with torch.no_grad():  # the block behind the selected layer gets no gradient, so its B stays zero
        for name, parameter in vision.named_parameters():
            if "layers.2." in name and "lora_B" in name:
                parameter.zero_()
    state = {f"llm.{key}": value for key, value in language.state_dict().items() if "lora_" in key}
    state |= {f"visual_encoder.{key}": value for key, value in vision.state_dict().items() if "lora_" in key}
    state |= {f"projector.model.{key}": value for key, value in projector.state_dict().items()}
    return language, vision, projector, state


class HistoryBuffer:
    """As MMEngine keeps a history of the loss beside the weights: arrays, and methods of its own class."""

    def __init__(self) -> None:
        self._log_history = np.array([1.0, 2.0])

    def mean(self) -> float:
        """Of the history."""
        return float(self._log_history.mean())

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"statistics_methods": {"mean": HistoryBuffer.mean}}


def save_pth(state, path: Path) -> Path:
    """A .pth of MMEngine's runner: weights, and everything beside them that it writes."""
    content = {
        "meta": {"cfg": "model = dict()", "seed": 1, "iter": 10, "mmengine_version": "0.10.7"},
        "state_dict": OrderedDict(state),
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": {"loss": np.float64(2)}},
        "param_schedulers": [{"by_epoch": True}],
    }
    torch.save(content, path)
    return path


@torch.no_grad()
def same_as(out: Path, plugins, language, vision, projector) -> None:
    """The folder's model gives what XTuner's parts give."""
    assistant = load_assistant(out, plugins, device=torch.device("cpu"), precision="fp32")
    pixels, ids = torch.randn(2, 3, 28, 28), torch.arange(5, 25)[None]
    theirs = projector(vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    assert torch.allclose(assistant.model.projector(assistant.model.vision(pixels)), theirs, atol=1e-5)
    with for_generation(assistant.model.causal_lm):
        assert torch.allclose(assistant.model.llm(ids).logits, language(ids).logits, atol=1e-5)
