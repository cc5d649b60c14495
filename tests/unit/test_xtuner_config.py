"""XTuner 0.1 configs, written here in its manner, become configs that load and keep every value."""

from pathlib import Path

import pytest
from xtuner_configs import LLAVA, TEXT, said

from mmft.convert.xtuner.names import image_tokens
from mmft.errors import ConfigError


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
    written = 'sample_steps=500, samples=(Prompt(text="What is it?", images=(Path("view.jpg"),)),)'
    assert f"opens no URL; save the picture, and in Runtime write {written}" in said(made)
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


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ("load_intern_repo_tokenized_dataset", r"reads tokens made beforehand \(\.bin\); train from the texts"),
        (
            "load_intern_repo_untokenized_dataset",
            r"write \{\"messages\": \[\.\.\.\]\} a line .* the data map openai reads",
        ),
    ],
)
def test_records_of_internlms_own_store_are_refused_with_what_to_do(converted, loader, words):
    packed = f"dict(type='xtuner.dataset.build_packed_dataset', dataset_cfg=dict(type='xtuner.{loader}', folder='d'))"
    with pytest.raises(ConfigError, match=words):
        converted(TEXT, after=f"train_dataloader['dataset'] = {packed}\n")
