"""XTuner 0.1 configs, written here in its manner, are read without being run and become configs that load and check."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

import pytest
from click.testing import CliRunner

from mmft.cli.convert_xtuner import xtuner_config
from mmft.config import TrainConfig
from mmft.config.check import find_problems
from mmft.config.foreign import is_xtuner_config
from mmft.config.load import list_configs, load_config
from mmft.convert.xtuner.config import Translation, translate
from mmft.convert.xtuner.names import image_tokens
from mmft.convert.xtuner.syntax import Named, Unread, read_assignments
from mmft.errors import ConfigError, UnknownName

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


@pytest.fixture
def converted(tmp_path, plugins):
    """`converted(body, old, new, ...)`: (what was written, its config), with texts of the body replaced."""

    def converted(body: str = TEXT, *changes: tuple[str, str], after: str = "") -> tuple[Translation, TrainConfig]:
        for old, new in changes:
            assert old in body
            body = body.replace(old, new)
        path = tmp_path / "old.py"
        path.write_text(IMPORTS + body + dedent(after), "utf-8")
        made = translate(path, plugins)
        target = tmp_path / "new.py"
        target.write_text(made.text, "utf-8")
        return made, load_config(str(target), plugins)

    return converted


def said(made: Translation) -> str:
    report = made.report
    return "\n".join([*report.edits, *report.differs, *report.lost])


def test_a_text_config_keeps_every_value(converted):
    made, config = converted()
    llm, data, optim, runtime = config.model.llm, config.data, config.optim, config.runtime
    assert made.report.edits == []
    assert (llm.path, llm.quantization, llm.trust_remote_code, llm.trainable) == ("acme/base-7b", "nf4", True, False)
    assert (llm.lora.r, llm.lora.alpha, llm.lora.dropout, llm.lora.targets) == (32, 64, 0.1, "all-linear")
    (dataset,) = data.datasets
    assert (dataset.source.name, dataset.source.options, dataset.data_map) == (
        "jsonl",
        {"path": "data/mine.jsonl"},
        "openai",
    )
    assert (data.chat_template, data.max_length, data.packing, data.too_long) == ("internlm2_chat", 1024, True, "split")
    assert (optim.lr, optim.betas, optim.weight_decay, optim.max_grad_norm) == (1e-4, (0.9, 0.95), 0.01, 0.5)
    assert (optim.warmup_ratio, optim.schedule, optim.epochs) == (0.05, "cosine", 3)
    assert (optim.batch_size_per_device, optim.accumulate) == (2, 4)
    assert (runtime.seed, runtime.save_total_limit, runtime.gradient_checkpointing) == (7, 3, True)
    assert runtime.output_dir == Path("work_dirs/old")
    assert [prompt.text for prompt in runtime.samples] == ["Who are you?", "What is 1 + 1?"]


def test_intervals_in_batches_become_optimizer_steps(converted):
    made, config = converted()
    assert (config.runtime.save_steps, config.runtime.sample_steps) == (50, 100)  # 200 and 400 batches, 4 a step
    assert "accumulate=4" in made.text
    _, config = converted(TEXT, ("max_epochs=epochs", "max_iters=1200"), ("epochs,\n", "1200,\n"))
    assert config.optim.max_steps == 300


def test_a_llava_config_keeps_its_two_adapters_and_counts_image_tokens(converted):
    made, config = converted(LLAVA)
    vision = config.model.vision
    assert made.report.edits == []
    assert config.model.llm.lora.targets == ("q_proj", "v_proj")
    assert not config.model.llm.trust_remote_code  # transformers builds Vicuna itself
    assert vision.encoder.name == "clip"
    assert vision.encoder.options == {
        "path": "openai/clip-vit-large-patch14-336",
        "select_layer": -2,
        "pad_to_square": True,
    }
    assert (vision.projector.name, vision.lora.r, vision.trainable) == ("mlp2x_gelu", 8, False)
    assert vision.projector_weights == Path("work_dirs/my_pretrain/final")
    assert config.data.max_length == 2048  # 1472 of text and 576 of the picture, as the person meant it
    assert config.data.datasets[0].image_folder == Path("data/llava/images")
    assert config.data.group_by_modality
    assert config.runtime.precision == "bf16"


def test_what_is_frozen_and_has_no_adapter_does_not_train(converted):
    start, end = LLAVA.index("    llm_lora="), LLAVA.index("    visual_encoder=")
    llm = converted(LLAVA, (LLAVA[start:end], ""))[1].model.llm
    assert (llm.lora, llm.trainable) == (None, False)


def test_a_llm_that_is_neither_frozen_nor_adapted_trains_whole(converted):
    lora = "    lora=dict(type=LoraConfig, r=32, lora_alpha=64, lora_dropout=0.1, bias='none', task_type='CAUSAL_LM'))"
    quantization = TEXT[TEXT.index("        quantization_config") : TEXT.index("    lora=dict")]
    llm = converted(TEXT, (quantization, "    ),\n"), (lora, ")"))[1].model.llm
    assert (llm.trainable, llm.lora, llm.quantization) == (True, None, "none")


def test_concatenated_data_sets_become_several(converted):
    _, config = converted(
        TEXT,
        after="""
        more = dict(
            type=process_hf_dataset, dataset=dict(type=load_dataset, path='acme/alpaca', name='en'), max_length=1024,
            dataset_map_fn=alpaca_map_fn, template_map_fn=dict(type=template_map_fn_factory, template=template))
        train_dataloader['dataset'] = dict(type=ConcatDataset, datasets=[train_dataset, more])
        """,
    )
    assert [dataset.data_map for dataset in config.data.datasets] == ["openai", "alpaca"]
    assert config.data.datasets[1].source.options == {"path": "acme/alpaca", "name": "en"}


def test_moss_records_come_by_their_own_data_set_class(converted):
    _, config = converted(
        TEXT,
        after="""
        train_dataloader['dataset'] = dict(
            type='xtuner.dataset.MOSSSFTDataset', data_file='data/moss.jsonl', bot_name='mine', max_length=1024)
        """,
    )
    (dataset,) = config.data.datasets
    assert (dataset.source.name, dataset.data_map, config.data.chat_template) == ("jsonl", "moss_sft", "moss_sft")


def test_a_picture_on_the_web_is_left_out_with_a_word(converted):
    hook = """
    custom_hooks = [dict(type=EvaluateChatHook, every_n_iters=500, evaluation_inputs=['What is it?'],
                         evaluation_images={!r})]
    """
    made, config = converted(LLAVA, after=hook.format("https://example.org/view.jpg"))
    assert config.runtime.samples == ()
    assert "opens no URL" in said(made)
    _, config = converted(LLAVA, after=hook.format("data/view.jpg"))
    assert config.runtime.samples[0].images == (Path("data/view.jpg"),)


def test_records_in_xtuners_own_form_are_read_as_they_are(converted):
    made, config = converted(TEXT, ("dataset_map_fn=openai_map_fn", "dataset_map_fn=None"))
    assert (config.data.datasets[0].data_map, made.report.edits) == ("xtuner", [])
    made, config = converted(
        TEXT,
        ("dataset_map_fn=openai_map_fn", "dataset_map_fn=None"),
        ("template_map_fn=dict(type=template_map_fn_factory, template=template)", "template_map_fn=None"),
    )
    assert (config.data.chat_template, made.report.edits) == ("auto", [])
    assert any("documents need none" in line for line in made.report.differs)


def test_documents_have_no_template(converted):
    _, config = converted(
        TEXT,
        ("openai_map_fn,\n", "pretrain_map_fn,\n"),
        ("template_map_fn=dict(type=template_map_fn_factory, template=template)", "template_map_fn=None"),
    )
    assert (config.data.datasets[0].data_map, config.data.chat_template) == ("pretrain", "auto")


def test_the_floor_of_the_schedule_and_trackers_are_kept(converted):
    _, config = converted(
        TEXT,
        ("eta_min=0.0", "eta_min=lr * 0.1"),
        after="visualizer = dict(type=Visualizer, vis_backends=[dict(type=TensorboardVisBackend)])\n",
    )
    assert (config.optim.schedule, config.optim.min_lr_ratio) == ("cosine_with_min_lr", 0.1)
    assert config.runtime.report_to == ("tensorboard",)


def test_a_setting_without_counterpart_is_a_comment_of_the_file(converted):
    made, _ = converted(TEXT, after="env_cfg = dict(cudnn_benchmark=True)\nauto_scale_lr = dict(base=16)\n")
    comments = "\n".join(line for line in made.text.splitlines() if line.startswith("#"))
    for name in ("env_cfg.cudnn_benchmark", "auto_scale_lr"):
        assert name in said(made)
        assert name in comments


def test_an_unknown_setting_of_the_model_is_not_passed_over(converted):
    made, _ = converted(TEXT, ("use_varlen_attn=use_varlen_attn,\n    llm", "surprise=3,\n    llm"))
    assert "model.surprise = 3" in made.report.lost


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("dataset_map_fn=openai_map_fn", "dataset_map_fn=my_map", "dataset_map_fn"),
        ("bias='none'", "bias='all'", "model.lora.bias"),
        ("template=template", "template=dict(INSTRUCTION='{input}')", "template_map_fn"),
        ("type=AdamW", "type=Sophia", "Sophia"),
        ("max_length=max_length", "max_length=measured()", "measured()"),
        ("llm=dict", "max_position_embeddings=8192,\n    llm=dict", "max_position_embeddings"),
        ("type=DatasetInfoHook", "type=MyHook", "MyHook"),
        ("load_from = None", "load_from = 'epoch_1.pth'", "epoch_1.pth"),
    ],
)
def test_what_cannot_be_translated_is_left_to_the_person(converted, old, new, words):
    made, _ = converted(TEXT, (old, new))
    assert any(words in line for line in made.report.edits)
    assert "# To do by hand:" in made.text


@pytest.mark.parametrize("model", ["DPO", "RewardModel", "InternVL_V1_5"])
def test_a_method_that_mmft_has_not_is_refused_by_name(converted, model):
    with pytest.raises(ConfigError, match=model):
        converted(TEXT, ("type=SupervisedFinetune", f"type={model}"))


def test_reading_runs_nothing(tmp_path):
    path, trace = tmp_path / "old.py", tmp_path / "trace"
    path.write_text(
        f"import os\nfrom xtuner.model import SupervisedFinetune\nlr = 1e-4\nx = open({str(trace)!r}, 'w')\n"
        f"y = os.system('touch {trace}')\nz = __import__('os').mkdir({str(trace)!r})\nwhile True:\n    pass\n"
    )
    values = read_assignments(path)
    assert values["lr"] == 1e-4
    assert all(isinstance(values[name], Unread) for name in "xyz")
    assert not trace.exists()


def test_the_command_imports_neither_xtuner_nor_mmengine(tmp_path):
    (tmp_path / "old.py").write_text(IMPORTS + TEXT, "utf-8")
    code = (
        "import sys; from pathlib import Path; from mmft.plugins import load_plugins;"
        "from mmft.convert.xtuner.config import translate; translate(Path(sys.argv[1]), load_plugins());"
        "assert not {'xtuner', 'mmengine', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "old.py")], check=True, timeout=600)


def test_arithmetic_branches_and_methods_are_worked_out(tmp_path):
    path = tmp_path / "old.py"
    path.write_text(
        dedent("""
        from acme import thing
        size = int(2048 - (336 / 14)**2)
        name = f'{size}_{"a" * 2}_{0.5:.2f}'
        items = [1] + [2]
        items += [3]
        items.append(4)
        settings = dict(a=1, **{'b': 2})
        settings.update(c=3)
        settings['d'] = dict(settings)['a'] + 3
        flag = not False and len(items) == 4
        if flag:
            items.extend([5])
        else:
            items = None
        if thing.on:
            unknown = 1
        chosen = 'yes' if flag else 'no'
        left, (right, *_) = 1, (2, 3)
        template = thing.PROMPT.vicuna
        """),
        "utf-8",
    )
    values = read_assignments(path)
    assert (values["size"], values["name"], values["chosen"]) == (1472, "1472_aa_0.50", "yes")
    assert values["items"] == [1, 2, 3, 4, 5]
    assert values["settings"] == {"a": 1, "b": 2, "c": 3, "d": 4}
    assert isinstance(values["unknown"], Unread)
    assert values["template"] == Named("acme.thing.PROMPT.vicuna")


@pytest.mark.parametrize(
    "bomb", ["'a' * 10 ** 9", "9 ** 9 ** 9", "'%1000000000d' % 1", "f'{1:999999999}'", "[0] * 10 ** 8"]
)
def test_no_expression_eats_the_machine(tmp_path, bomb):
    path = tmp_path / "old.py"
    path.write_text(f"x = {bomb}\n", "utf-8")
    assert isinstance(read_assignments(path)["x"], Unread)


def test_a_base_file_is_read_too(tmp_path):
    (tmp_path / "base.py").write_text("lr = 1e-4\nmodel = dict(a=1, b=dict(c=2))\n", "utf-8")
    (tmp_path / "lazy.py").write_text(
        "from mmengine.config import read_base\nwith read_base():\n    from .base import *\nlr = lr * 2\n", "utf-8"
    )
    (tmp_path / "old.py").write_text("_base_ = ['base.py']\nmodel = dict(b=dict(d=3))\n", "utf-8")
    assert read_assignments(tmp_path / "lazy.py")["lr"] == 2e-4
    assert read_assignments(tmp_path / "old.py")["model"] == {"a": 1, "b": {"c": 2, "d": 3}}


def test_what_xtuner_dumps_into_a_work_folder_is_understood(tmp_path, plugins):
    """There classes and functions are dotted strings, and the user's functions their repr."""
    lines = []
    text = IMPORTS + TEXT
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.parse(text).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    path = tmp_path / "dumped.py"
    (tmp_path / "source.py").write_text(text, "utf-8")

    def dumped(value):
        if isinstance(value, Named):
            return value.dotted
        if isinstance(value, dict):
            return {key: dumped(item) for key, item in value.items()}
        return type(value)(map(dumped, value)) if isinstance(value, list | tuple) else value

    for name, value in read_assignments(tmp_path / "source.py").items():
        if name not in (*names, "torch"):
            lines.append(f"{name} = {dumped(value)!r}")
    path.write_text("\n".join(lines), "utf-8")
    assert is_xtuner_config(path)
    made, original = translate(path, plugins), translate(tmp_path / "source.py", plugins)
    assert made.report.edits == []
    assert made.text.replace("dumped", "source") == original.text


def test_train_names_the_command_that_converts(tmp_path, plugins):
    path = tmp_path / "old.py"
    path.write_text(IMPORTS + TEXT, "utf-8")
    with pytest.raises(ConfigError, match=rf"mmft convert xtuner-config {path} old_mmft.py"):
        load_config(str(path), plugins)


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("internlm2_chat_7b_qlora_oasst1_e3", "internlm2_1_8b_qlora_alpaca"),
        ("qwen_7b_full_alpaca_e3_copy", "custom_full_sft"),
        ("llava_llama3_8b_instruct_quant_clip_vit_large_p14_336_e1_gpu1_pretrain", "llava_pretrain"),
        ("llava_internlm2_chat_7b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune", "llava_internlm2_1_8b_finetune"),
        ("internlm2_7b_w_untokenized_dataset_e3", None),
        ("zephyr_7b_beta_qlora_alpaca_e3", None),
    ],
)
def test_the_name_of_an_xtuner_config_leads_to_one_of_ours(plugins, name, closest):
    with pytest.raises(UnknownName, match=f"{name!r}, which is XTuner's spelling") as caught:
        load_config(name, plugins)
    assert f"mmft convert xtuner-config {name}.py" in str(caught.value)
    named = re.search(r"copy-cfg (\w+)", str(caught.value))
    assert named is not None and named[1] in {one.name for one in list_configs(plugins)}
    assert closest in (None, named[1])


def test_a_misspelt_name_of_ours_is_no_xtuner_name(plugins):
    with pytest.raises(UnknownName, match="did you mean 'llava_finetune'"):
        load_config("llava_fintune", plugins)


def test_a_config_of_ours_is_no_xtuner_config(tmp_path, plugins, converted):
    converted()
    assert not is_xtuner_config(tmp_path / "new.py")
    with pytest.raises(ConfigError, match="mmft check"):
        translate(tmp_path / "new.py", plugins)


def test_the_written_file_lacks_nothing_but_the_data(tmp_path, plugins, converted):
    for body in (TEXT, LLAVA):
        _, config = converted(body)
        problems = [str(problem) for problem in find_problems(config, plugins)]
        assert problems
        assert all("does not exist" in text or "is not a folder" in text for text in problems)


def test_the_written_file_is_in_house_style(tmp_path, converted):
    for body in (TEXT, LLAVA):
        converted(body)
        for command in (["format", "--check"], ["check", "--select", "E,F,I,UP"]):
            ruff = [sys.executable, "-m", "ruff", *command, "--line-length", "120", "--isolated", "new.py"]
            done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_says_what_differs_and_fails_where_work_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.py").write_text(IMPORTS + TEXT, "utf-8")
    done = CliRunner().invoke(xtuner_config, ["old.py"], standalone_mode=False)
    assert done.return_value == 0, done.output
    assert "nothing to do by hand; next: mmft check old_mmft.py" in done.output
    assert "packing" in done.output
    again = CliRunner().invoke(xtuner_config, ["old.py"], standalone_mode=False)
    assert "exists already" in str(again.exception)
    Path("old.py").write_text(IMPORTS + TEXT.replace("openai_map_fn,", "mine,"), "utf-8")
    done = CliRunner().invoke(xtuner_config, ["old.py", "new.py"], standalone_mode=False)
    assert done.return_value == 1
    assert "to do by hand" in done.output


@pytest.mark.parametrize(
    ("encoder", "tokens"),
    [
        ("openai/clip-vit-large-patch14-336", 576),
        ("openai/clip-vit-large-patch14", 256),
        ("google/siglip-so400m-patch14-384", 729),
        ("my/encoder", None),
    ],
)
def test_the_tokens_of_a_picture_are_those_of_the_encoders_name(encoder, tokens):
    assert image_tokens(encoder) == tokens


def test_an_encoder_whose_name_says_nothing_is_an_edit(converted):
    made, config = converted(LLAVA, ("'openai/clip-vit-large-patch14-336'", "'my/clip'"))
    assert config.data.max_length == 1472
    assert any("max_length" in line for line in made.report.edits)


def test_a_broken_file_is_one_line_with_its_place(tmp_path, plugins):
    path = tmp_path / "old.py"
    path.write_text("from xtuner.model import X\nmodel = dict(\n", "utf-8")
    with pytest.raises(ConfigError, match=r"old\.py:2"):
        translate(path, plugins)
    path.write_text("from xtuner.model import X\n" + indent("x = 1", ""), "utf-8")
    with pytest.raises(ConfigError, match=r"has no `model`|names no data set"):
        translate(path, plugins)
