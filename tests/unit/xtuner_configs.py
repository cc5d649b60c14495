"""XTuner 0.1 configs, written here in its manner, and what a translation says of one."""

from pathlib import Path
from textwrap import dedent

from mmft.config import TrainConfig
from mmft.config.load import load_config
from mmft.convert.xtuner.config import Translation, translate
from mmft.plugins import Plugins

IMPORTS = """
import torch
from datasets import load_dataset
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, CLIPImageProcessor, CLIPVisionModel
from mmengine.dataset import DefaultSampler
from mmengine.visualization import Visualizer, TensorboardVisBackend
from xtuner.dataset import ConcatDataset, LLaVADataset, process_hf_dataset
from xtuner.dataset.map_fns import alpaca_map_fn, llava_map_fn, openai_map_fn, pretrain_map_fn, template_map_fn_factory
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.engine.hooks import DatasetInfoHook, EvaluateChatHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import LLaVAModel, SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE
"""
TEXT = """
llm_path = 'acme/base-7b'
template = PROMPT_TEMPLATE.internlm2_chat
max_length = 1024
pack = True
use_varlen_attn = False
batch_size = 2
accumulative_counts = 4
epochs = 3
lr = 1e-4
warmup = 0.05
questions = ['Who are you?', 'What is 1 + 1?']

tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=llm_path, padding_side='right')
model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=llm_path,
        trust_remote_code=True,
        torch_dtype=torch.float16,
        quantization_config=dict(
            type=BitsAndBytesConfig, load_in_4bit=True, load_in_8bit=False,
            bnb_4bit_use_double_quant=True, bnb_4bit_quant_type='nf4')),
    lora=dict(type=LoraConfig, r=32, lora_alpha=64, lora_dropout=0.1, bias='none', task_type='CAUSAL_LM'))
train_dataset = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path='json', data_files=['data/mine.jsonl']),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=openai_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=template),
    pack_to_max_length=pack,
    use_varlen_attn=use_varlen_attn)
train_dataloader = dict(
    batch_size=batch_size, num_workers=0, dataset=train_dataset, sampler=dict(type=DefaultSampler, shuffle=True))
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
    clip_grad=dict(max_norm=0.5, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts, loss_scale='dynamic', dtype='float16')
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup * epochs, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=warmup * epochs, end=epochs,
         convert_to_iter_based=True)]
train_cfg = dict(type=TrainLoop, max_epochs=epochs)
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=EvaluateChatHook, tokenizer=tokenizer, every_n_iters=400, evaluation_inputs=questions, system='')]
default_hooks = dict(
    logger=dict(type=LoggerHook, interval=10),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=200, max_keep_ckpts=3))
randomness = dict(seed=7, deterministic=False)
load_from = None
resume = False
"""
LLAVA = """
llm_path = 'lmsys/vicuna-7b-v1.5'
clip_path = 'openai/clip-vit-large-patch14-336'
root = './data/llava/'
max_length = int(2048 - (336 / 14)**2)
image_processor = dict(type=CLIPImageProcessor.from_pretrained, pretrained_model_name_or_path=clip_path)
model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    freeze_visual_encoder=True,
    pretrained_pth='./work_dirs/my_pretrain/iter_2181.pth',
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm_path, trust_remote_code=True),
    llm_lora=dict(type=LoraConfig, r=16, lora_alpha=32, lora_dropout=0.05, target_modules=['q_proj', 'v_proj']),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=clip_path),
    visual_encoder_lora=dict(type=LoraConfig, r=8, lora_alpha=16, lora_dropout=0.05, bias='none'))
train_dataset = dict(
    type=LLaVADataset,
    data_path=root + 'mix.json',
    image_folder=f'{root}images',
    image_processor=image_processor,
    dataset_map_fn=llava_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.vicuna),
    max_length=max_length,
    pad_image_to_square=True)
train_dataloader = dict(
    batch_size=16, num_workers=4, dataset=train_dataset,
    sampler=dict(type=LengthGroupedSampler, length_property='modality_length', per_device_batch_size=16))
optim_wrapper = dict(type=AmpOptimWrapper, optimizer=dict(type=AdamW, lr=2e-4), dtype='bfloat16')
train_cfg = dict(type=TrainLoop, max_epochs=1)
"""


def said(made: Translation) -> str:
    report = made.report
    return "\n".join([*report.edits, *report.differs, *report.lost])


def convert(
    folder: Path, plugins: Plugins, body: str, *changes: tuple[str, str], after: str = ""
) -> tuple[Translation, TrainConfig]:
    """(what was written, its config) of a config of XTuner; each change is a text of the body and what replaces it."""
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    path, target = folder / "old.py", folder / "new.py"
    path.write_text(IMPORTS + body + dedent(after), "utf-8")
    made = translate(path, plugins)
    target.write_text(made.text, "utf-8")
    return made, load_config(str(target), plugins)
