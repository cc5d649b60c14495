"""What `mmft check` says of adapters, new tokens, schedules and the rates of parts."""

import json

import pytest

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, override, use
from mmft.config.check import find_problems


@pytest.fixture
def config(tmp_path, tiny_llm_path, tiny_clip_path):
    """A whole config with nothing wrong."""
    (tmp_path / "data.json").write_text(json.dumps([]))
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(tiny_llm_path), lora=Lora(r=4)),
            vision=Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("mlp2x_gelu")),
        ),
        data=Data(
            datasets=(Dataset(source=use("json", path=str(tmp_path / "data.json")), data_map="llava"),), max_length=128
        ),
        optim=Optim(lr=1e-4),
        runtime=Runtime(output_dir=tmp_path / "run"),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"model.llm.lora.init": "pissa", "model.llm.lora.rslora": True},
        {"model.llm.lora.dora": True, "model.llm.quantization": "fp4"},
        {"model.llm.lora.init": "gaussian", "model.llm.quantization": "int8"},
        {"model.llm.new_tokens": ("<a>", "<b>"), "model.llm.lora.targets": r".*\.q_proj"},
        {"optim.schedule": "cosine_with_min_lr", "optim.min_lr_ratio": 0.1},
        {"optim.schedule": "warmup_stable_decay", "optim.decay_ratio": 0.2},
        {"optim.neftune_alpha": 5.0, "optim.optimizer": "paged_adamw_32bit", "optim.projector_weight_decay": 0.1},
        {"model.hub": "modelscope"},
    ],
    ids=str,
)
def test_what_goes_together_is_no_problem(config, plugins, changes):
    assert [str(problem) for problem in find_problems(override(config, changes), plugins)] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"model.llm.lora.init": "pissa", "model.llm.quantization": "nf4"},
            (
                "model.llm.lora.init: 'pissa' needs weights that are not quantised, these are nf4; set init='default' "
                "or 'gaussian', or model.llm.quantization='none'"
            ),
        ),
        (
            {"model.llm.lora.init": "olora", "model.llm.lora.dora": True},
            "model.llm.lora.dora: DoRA and init='olora' do not go together; drop one of them",
        ),
        (
            {"model.vision.lora": {"r": 3, "init": "orthogonal"}},
            "model.vision.lora.r: init='orthogonal' needs an even rank, found 3; set 4",
        ),
        (
            {"model.llm.lora.targets": "(q_proj"},
            (
                "model.llm.lora.targets: '(q_proj' is no regular expression: missing ), unterminated subpattern at "
                "position 0; give one, 'all-linear', or a tuple of layer names"
            ),
        ),
        (
            {"model.llm.lora.dora": True, "model.llm.quantization": "int8", "runtime.device": "cpu"},
            "model.llm.lora.dora: DoRA on int8 weights needs a GPU; set quantization='nf4', or dora=False",
        ),
        (
            {"model.llm.lora": None, "model.llm.new_tokens": ("<a>",)},
            (
                "model.llm.new_tokens: new tokens of a frozen language model would never be learnt; set model.llm.lora "
                "or .trainable"
            ),
        ),
        (
            {"model.llm.new_tokens": ("<a>", "<a>")},
            "model.llm.new_tokens: '<a>' is given twice; drop one",
        ),
        (
            {"model.llm.new_tokens": ("<a> ",)},
            "model.llm.new_tokens: '<a> ' is empty or has spaces around it; give the bare text of the token",
        ),
        (
            {"model.llm.new_tokens": ("<image>",)},
            "model.llm.new_tokens: '<image>' stands for pictures and is added where the model has images; drop it",
        ),
        (
            {"optim.schedule": "cosine_with_min_lr"},
            "optim.min_lr_ratio: cosine_with_min_lr needs it; give a share of the rate, such as 0.1",
        ),
        (
            {"optim.min_lr_ratio": 0.1},
            "optim.min_lr_ratio: cosine has no floor; drop it; cosine_with_min_lr and warmup_stable_decay have one",
        ),
        (
            {"optim.decay_ratio": 0.1},
            "optim.decay_ratio: cosine does not use it; drop it; warmup_stable_decay does",
        ),
        (
            {"optim.schedule": "warmup_stable_decay", "optim.decay_ratio": 0.99},
            "optim.decay_ratio: warm-up (0.03) and fall take more than the run; lower one",
        ),
        (
            {"optim.vision_weight_decay": 0.1},
            "optim.vision_weight_decay: the vision encoder does not train; set model.vision.lora or drop it",
        ),
        (
            {"model.vision.projector_trainable": False, "optim.projector_weight_decay": 0.1},
            "optim.projector_weight_decay: there is no projector that trains; drop it",
        ),
        (
            {"optim.optimizer": "paged_adamw_8bits"},
            (
                "optim.optimizer: no optimizer named 'paged_adamw_8bits'; did you mean 'paged_adamw_8bit'?; usual "
                "ones: adamw_torch, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit, lion_8bit, adafactor"
            ),
        ),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said_in_one_line(config, plugins, changes, expected):
    assert [str(problem) for problem in find_problems(override(config, changes), plugins)] == [expected]


def test_an_adapter_to_start_from_has_its_own_start(config, plugins, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    changed = override(config, {"model.llm.adapter": tmp_path, "model.llm.lora.init": "pissa"})
    assert [str(problem) for problem in find_problems(changed, plugins)] == [
        "model.llm.lora.init: an adapter to start from has its own start; drop init or adapter"
    ]
