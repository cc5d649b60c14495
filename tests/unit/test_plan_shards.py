"""What several processes share out: the ZeRO paper's formulas, on a model whose weights can be counted by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use
from mmft.config.load import override
from mmft.data.shape import describe_model
from mmft.plan.memory import Memory, Planner
from mmft.plan.report import make_report
from mmft.plan.shards import shards_of
from mmft.plan.simulate import BatchShape
from mmft.plugins import Plugins
from mmft.testing import tiny_tokenizer

Plan = Callable[..., Memory]


@pytest.fixture
def config(tiny_llm_path: Path, tmp_path: Path) -> TrainConfig:
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "yes " * 20}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * 64))
    source = use("json", path=tmp_path / "data.json")
    return TrainConfig(
        model=Model(llm=LLM(path=str(tiny_llm_path), trainable=True)),
        data=Data(datasets=(Dataset(source=source, data_map="llava"),), chat_template="chatml", max_length=512),
        optim=Optim(lr=1e-3, batch_size_per_device=2),
        runtime=Runtime(output_dir=tmp_path / "run", device="cpu", precision="bf16"),
    )


@pytest.fixture
def plan(config: TrainConfig, plugins: Plugins) -> Plan:
    shape = describe_model(config.model, plugins)

    def plan(processes: int = 1, precision: str = "bf16", **runtime: object) -> Memory:
        changes = {f"runtime.{name}": value for name, value in {**runtime, "precision": precision}.items()}
        return Planner(plugins, shape, "cuda", processes).estimate(override(config, changes), [BatchShape((40,), 30)])

    return plan


@pytest.mark.parametrize(
    ("stage", "each"), [("zero1", (2, 2, 12 / 4)), ("zero2", (2, 2 / 4, 12 / 4)), ("zero3", (2 / 4, 2 / 4, 12 / 4))]
)
def test_four_processes_keep_the_bytes_a_weight_of_the_paper(
    stage: str, each: tuple[float, float, float], plan: Plan
) -> None:
    """Mixed precision with Adam: 2 for weights, 2 for gradients, K = 12 for the optimizer, each over N or not."""
    memory = plan(4, deepspeed=stage)
    number = memory.trained["llm"]
    found = [memory.parts[part] / number for part in ("llm weights", "gradients", "optimizer")]
    assert found == pytest.approx(each, rel=0.02)


def test_float32_under_zero_keeps_its_master_copy_beside_the_states(plan: Plan) -> None:
    memory = plan(2, precision="fp32", deepspeed="zero2")
    number = memory.trained["llm"]
    assert memory.parts["llm weights"] == pytest.approx(4 * number, rel=0.02)
    assert memory.parts["gradients"] == 4 * number // 2
    assert memory.parts["optimizer"] == pytest.approx(12 * number / 2, rel=0.02)


def test_fsdp_shares_float32_weights_gradients_and_states(plan: Plan) -> None:
    memory = plan(4, fsdp=True)
    number = memory.trained["llm"]
    for part, size in (("llm weights", 4), ("gradients", 4), ("optimizer", 8)):
        assert memory.parts[part] == pytest.approx(size * number / 4, rel=0.02), part
    assert 0 < memory.parts["communication"] < plan(4, deepspeed="zero3").parts["communication"]


OFFLOADED = {"zero2_offload": {"optimizer": 12, "gradients": 4}}
OFFLOADED["zero3_offload"] = {**OFFLOADED["zero2_offload"], "weights": 2}


@pytest.mark.parametrize(("name", "ram"), OFFLOADED.items())
def test_what_is_offloaded_is_in_ram_and_not_on_the_card(name: str, ram: dict[str, int], plan: Plan) -> None:
    memory = plan(2, deepspeed=name)
    number = memory.trained["llm"]
    assert set(memory.ram) == set(ram)
    for part, size in ram.items():
        assert memory.ram[part] == pytest.approx(size * number, rel=0.02), part
    assert memory.parts["gradients"] == memory.parts["optimizer"] == 0
    assert (memory.parts["llm weights"] == 0) is ("weights" in ram)


def test_ddp_shares_nothing_and_copies_each_gradient_once(plan: Plan) -> None:
    alone, both = plan(1), plan(2)
    assert both.parts["communication"] == alone.parts["gradients"] == both.parts["gradients"]
    assert both.total - alone.total == both.parts["communication"]
    assert alone.notes == () and "share out nothing; held against no measurement" in both.notes[0]


def test_buckets_are_those_of_the_deepspeed_file(config: TrainConfig, plugins: Plugins, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}}))
    shards = shards_of(override(config, {"runtime.deepspeed": str(path)}), plugins, 2)
    assert shards.gathered(torch.nn.Linear(3, 3), 3, torch.bfloat16) == 1000 * 2 * 2


def test_steps_are_shared_by_the_processes_but_not_by_those_of_one_row(config: TrainConfig, plugins: Plugins) -> None:
    one = make_report(config, plugins, gpu="8GB", advise=False)
    four = make_report(config, plugins, gpu="8GB", advise=False, processes=4)
    assert (one.steps_per_epoch, four.steps_per_epoch) == (32, 8)
    shared = override(config, {"runtime.sequence_parallel": 2})
    assert make_report(shared, plugins, gpu="8GB", advise=False, processes=4).steps_per_epoch == 16


def test_engines_are_offered_where_they_save_and_can_hold_the_model(
    config: TrainConfig, plugins: Plugins, tmp_path: Path
) -> None:
    folder = tiny_tokenizer(tmp_path / "wide")  # a config without weights: nothing is loaded
    LlamaConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=4, vocab_size=8000).save_pretrained(folder)
    wide = override(config, {"model.llm.path": str(folder)})
    full = make_report(wide, plugins, gpu="1GB", processes=4)
    saved = {str(change).removeprefix("--set runtime.deepspeed="): change.saved for change in full.changes}
    assert 0 < saved["zero2"] < saved["zero2_offload"] < saved["zero3_offload"]
    adapted = {"model.llm.trainable": False, "model.llm.lora": Lora(r=256), "model.llm.quantization": "nf4"}
    quantised = make_report(override(wide, adapted), plugins, gpu="1GB", processes=4)
    assert quantised.changes and not any("zero3" in str(change) for change in quantised.changes)
