"""DeepSpeed by name or path, and the engines that `mmft check` refuses."""

import importlib.util
import json

import pytest

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, override, use
from mmft.config.check_engine import deepspeed_files, engine_problems, heads_of, read_deepspeed, zero_stage
from mmft.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        model=Model(llm=LLM(path="a/b", lora=Lora())),
        data=Data(datasets=(Dataset(source=use("jsonl", path="x"), data_map="messages"),), max_length=8),
        optim=Optim(lr=1e-4),
        runtime=Runtime(output_dir=tmp_path),
    )


def told(config, plugins, **changes):
    return [str(problem) for problem in engine_problems(override(config, changes), plugins)]


def test_the_shipped_configs_have_nothing_that_a_field_decides(config, plugins):
    names = sorted(deepspeed_files(plugins))
    assert names == ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    for name in names:
        assert told(config, plugins, **{"runtime.deepspeed": name}) == []
        assert zero_stage(read_deepspeed(name, plugins)) == int(name[4])


def test_the_names_of_xtuner_mean_the_same(plugins):
    assert read_deepspeed("deepspeed_zero3_offload", plugins) == read_deepspeed("zero3_offload", plugins)


def test_an_unknown_name_is_told_with_the_nearest_one(config, plugins):
    (problem,) = told(config, plugins, **{"runtime.deepspeed": "zero2_ofload"})
    assert "no DeepSpeed config or file 'zero2_ofload'; did you mean 'zero2_offload'?" in problem


def test_a_file_of_the_users_is_read_and_may_not_decide_what_a_field_decides(config, plugins, tmp_path):
    path = tmp_path / "ds.json"
    content = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    path.write_text(json.dumps(content))
    assert read_deepspeed(str(path), plugins) == content
    assert told(config, plugins, **{"runtime.deepspeed": str(path)}) == []
    wrong = {"gradient_accumulation_steps": 4, "bf16": {"enabled": True}, "optimizer": {"type": "AdamW"}}
    path.write_text(json.dumps(content | wrong))
    problems = "\n".join(told(config, plugins, **{"runtime.deepspeed": str(path)}))
    assert "gradient_accumulation_steps is 4 there, and optim.accumulate decides it; write 'auto'" in problems
    assert "bf16.enabled is True there, and runtime.precision decides it" in problems
    assert "its section 'optimizer' would replace the learning rates of the parts" in problems


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_that_is_no_json_object_is_one_line(plugins, tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"ds.json (is no JSON|holds no object)"):
        read_deepspeed(str(path), plugins)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"runtime.deepspeed": "zero2", "runtime.fsdp": True}, "DeepSpeed and FSDP exclude each other"),
        ({"runtime.deepspeed": "zero3", "model.llm.quantization": "nf4"}, "ZeRO-3 cannot shard weights in nf4"),
        ({"runtime.fsdp": True, "model.llm.quantization": "int8"}, "weights in int8 cannot be sharded"),
        ({"runtime.fsdp": True, "runtime.precision": "fp16"}, "fp16 needs a loss scale"),
        ({"runtime.sequence_parallel": 2, "runtime.fsdp": True}, "rows and weights cannot both be shared out"),
        ({"runtime.sequence_parallel": 2, "runtime.deepspeed": "zero3"}, "rows and weights cannot both be shared out"),
        ({"runtime.sequence_parallel": 2, "model.llm.attention": "sdpa"}, "sdpa cannot exchange heads"),
        ({"runtime.fsdp": True, "optim.optimizer": "paged_adamw_8bit"}, "paged_adamw_8bit cannot step on shards"),
    ],
)
def test_an_engine_that_cannot_hold_the_model_is_refused(config, plugins, changes, problem):
    assert any(problem in line for line in told(config, plugins, **changes))


def test_fp16_on_a_cpu_is_refused_under_deepspeed_alone(config, plugins):
    fp16 = {"runtime.precision": "fp16", "runtime.device": "cpu"}
    (problem,) = told(config, plugins, **fp16, **{"runtime.deepspeed": "zero2"})
    assert problem == "runtime.precision: DeepSpeed has no fp16 on a CPU; use fp32 or bf16, or drop runtime.deepspeed"
    assert told(config, plugins, **fp16) == []
    assert told(config, plugins, **fp16 | {"runtime.precision": "bf16"}, **{"runtime.deepspeed": "zero2"}) == []


def test_heads_that_cannot_be_shared_evenly_are_told_from_the_models_config_alone(config, plugins, tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 28, "num_key_value_heads": 4}))
    model = {"model.llm.path": str(folder)}
    (problem,) = told(config, plugins, **model, **{"runtime.sequence_parallel": 8})
    assert problem == (
        "runtime.sequence_parallel: 8 must divide the heads of attention (28 and 4); set it to a divisor, or 1"
    )
    assert told(config, plugins, **model, **{"runtime.sequence_parallel": 4}) == []
    assert told(config, plugins, **{"runtime.sequence_parallel": 8}) == [], "a model that is not here is asked later"


@pytest.mark.parametrize("content", ["{", "[1]", '{"text_config": 3}'])
def test_a_models_config_that_cannot_be_read_is_told_where_the_model_is_loaded(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert heads_of(str(tmp_path)) == []


def test_a_missing_deepspeed_is_one_line_with_the_command(config, plugins, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else real(name, *a))
    assert told(config, plugins, **{"runtime.deepspeed": "zero2"}) == [
        "runtime.deepspeed: DeepSpeed is not installed; pip install 'mmft[deepspeed]'"
    ]
