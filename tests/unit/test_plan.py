"""The estimate against what torch, peft and bitsandbytes really make of the same config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.data.shape import Shape, describe_model
from mmft.modeling.build import build_model
from mmft.modeling.llava import LlavaModel
from mmft.plan.memory import Planner
from mmft.plan.simulate import BatchShape, LiveBytes, batch_inputs
from mmft.plan.skeleton import stored_bytes
from mmft.plugins import Plugins
from mmft.testing import tiny_llm, tiny_tokenizer

LORA = Lora(r=4)
FULL, ADAPTED = {"trainable": True}, {"lora": LORA}
QLORA, INT8 = {"lora": LORA, "quantization": "nf4"}, {"lora": LORA, "quantization": "int8"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("plan") / "llama", width=64)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 whose head is its embedding, and whose projections have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tiny_tokenizer(tmp_path_factory.mktemp("plan") / "qwen2")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=500, num_key_value_heads=2, tie_word_embeddings=True, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def make(llama: Path, tied: Path, tiny_clip_path: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(llm: dict[str, Any], *, sees: bool = False, which: str = "llama", **options: Any) -> TrainConfig:
        encoder = use("clip", path=str(tiny_clip_path))
        vision = Vision(encoder=encoder, projector=use("mlp2x_gelu"), **options.pop("vision", {})) if sees else None
        return TrainConfig(
            model=Model(llm=LLM(path=str({"llama": llama, "tied": tied}[which]), **llm), vision=vision),
            data=Data(
                datasets=(Dataset(source=use("json", path=tmp_path / "none.json"), data_map="llava"),),
                chat_template="chatml",
                max_length=512,
            ),
            optim=Optim(lr=1e-3, **options.pop("optim", {})),
            runtime=Runtime(output_dir=tmp_path / "run", device="cpu", **{"precision": "fp32", **options}),
        )

    return make


def built(config: TrainConfig, plugins: Plugins, shape: Shape, planner: Planner) -> LlavaModel:
    return build_model(
        config.model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=planner.dtype(config),
        device=torch.device("cpu"), gradient_checkpointing=config.runtime.gradient_checkpointing,
    ).train()  # fmt: skip


def real_bytes(module: torch.nn.Module) -> int:
    """Parameters and buffers, and what bitsandbytes keeps beside a 4-bit or 8-bit weight."""
    total = 0
    for tensor in (*module.parameters(), *module.buffers()):
        total += tensor.nbytes
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + state.code.nbytes
            total += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    eight_bit = [layer for layer in module.modules() if hasattr(layer, "init_8bit_state")]
    return total + sum((layer.weight.SCB if layer.state.SCB is None else layer.state.SCB).nbytes for layer in eight_bit)


@pytest.mark.parametrize("which", ["llama", "tied"])
@pytest.mark.parametrize("llm", [FULL, ADAPTED, QLORA, INT8], ids=["full", "lora", "nf4", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_counts_are_those_of_the_model_that_is_built(
    which: str, llm: dict[str, Any], precision: str, make: Callable[..., TrainConfig], plugins: Plugins
) -> None:
    config = make(llm, which=which, sees=True, precision=precision)
    shape = describe_model(config.model, plugins)
    planner = Planner(plugins, shape, "cpu")
    memory = planner.estimate(config, [BatchShape((8,), 4)])
    real = built(config, plugins, shape, planner)
    for name, module in real.parts().items():
        weights = memory.parts[f"{name} weights"] + memory.parts.get(f"{name} LoRA", 0)
        # what the encoder's features do not depend on (its last norm) is not in every build of it
        assert weights == pytest.approx(real_bytes(module), rel=0.01 if name == "vision" else 0, abs=0), name
        assert memory.trained[name] == sum(p.numel() for p in module.parameters() if p.requires_grad), name
    if config.model.llm.quantization == "none":
        assert memory.parameters["llm"] == sum(p.numel() for p in real.llm.parameters())


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (172, 96), (1376, 512), (96, 1000)])
def test_a_quantised_weight_takes_exactly_what_bitsandbytes_keeps(rows: int, columns: int) -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    assert stored_bytes("nf4", rows, columns) == real_bytes(layer)
    int8 = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False).to("cpu")
    assert stored_bytes("int8", rows, columns) == int8.weight.nbytes + int8.weight.SCB.nbytes


@pytest.mark.parametrize(
    "optimizer", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"]
)
def test_optimizer_states_take_what_the_real_one_allocates(
    optimizer: str, make: Callable[..., TrainConfig], plugins: Plugins
) -> None:
    from transformers import Trainer

    from mmft.train.trainer import parameter_groups, training_arguments

    config = make(FULL, optim={"optimizer": optimizer})
    shape = describe_model(config.model, plugins)
    planner = Planner(plugins, shape, "cpu")
    memory = planner.estimate(config, [BatchShape((8,), 4)])
    model = built(config, plugins, shape, planner)
    arguments = training_arguments(config, dtype=torch.float32, device=torch.device("cpu"))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    real = kind(parameter_groups(model, config.optim), **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    real.step()
    tensors = [v for state in real.state.values() for v in state.values() if isinstance(v, Tensor)]
    allocated = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.nbytes}.values())
    assert memory.parts["optimizer"] == pytest.approx(allocated, rel=0.01, abs=4096)


def inputs_of(model: LlavaModel, config: TrainConfig, planner: Planner, batch: BatchShape) -> dict[str, Tensor]:
    """The batch that was estimated, with numbers in it."""
    skeleton = planner._skeleton(config)
    tokens = planner.shape.tokenizer.tokens_per_image
    inputs = batch_inputs(skeleton, config, batch, tokens)
    return {k: torch.zeros(v.shape, dtype=v.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


TEXT, SEEN = BatchShape((100, 60, 90), 120), BatchShape((90, 70), 60, 3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("sees", [False, True], ids=["text", "llava"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("llm", [FULL, ADAPTED, QLORA, INT8], ids=["full", "lora", "nf4", "int8"])
def test_a_step_keeps_and_peaks_at_what_a_real_one_does(
    llm: dict[str, Any], precision: str, sees: bool, checkpointing: bool,
    make: Callable[..., TrainConfig], plugins: Plugins,
) -> None:  # fmt: skip
    config = make(llm, sees=sees, precision=precision, gradient_checkpointing=checkpointing)
    shape, batch = describe_model(config.model, plugins), SEEN if sees else TEXT
    planner = Planner(plugins, shape, "cpu")
    step = planner.estimate(config, [batch]).step
    assert step
    model = built(config, plugins, shape, planner)
    inputs = inputs_of(model, config, planner, batch)
    model(**inputs)["loss"].backward()  # bitsandbytes settles its states at the first step
    model.zero_grad()
    known = [*model.parameters(), *model.buffers(), *inputs.values()]
    with LiveBytes(known) as counted:
        loss = model(**inputs)["loss"]
        saved = counted.live
        loss.backward()
    assert step.saved == pytest.approx(saved, rel=0.03)
    assert step.working + step.gradients == pytest.approx(counted.peak, rel=0.05)


@pytest.mark.parametrize("sees", [False, True], ids=["text", "llava"])
@pytest.mark.parametrize("llm", [FULL, ADAPTED], ids=["full", "lora"])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves(
    llm: dict[str, Any], sees: bool, make: Callable[..., TrainConfig], plugins: Plugins
) -> None:
    """The same number by another way: torch's own hooks on each tensor that is saved."""
    config = make(llm, sees=sees)
    shape, batch = describe_model(config.model, plugins), SEEN if sees else TEXT
    planner = Planner(plugins, shape, "cpu")
    step = planner.estimate(config, [batch]).step
    model = built(config, plugins, shape, planner)
    inputs = inputs_of(model, config, planner, batch)
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), *inputs.values())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs)["loss"]
    assert loss.requires_grad
    assert step and step.saved == pytest.approx(sum(saved.values()), rel=0.05)


def test_checkpointing_shorter_rows_and_fewer_targets_all_need_less(
    make: Callable[..., TrainConfig], plugins: Plugins
) -> None:
    config, saving = make(FULL), make(FULL, gradient_checkpointing=True)
    planner = Planner(plugins, describe_model(config.model, plugins), "cpu")
    whole = planner.estimate(config, [TEXT]).total
    assert planner.estimate(saving, [TEXT]).total < whole
    assert planner.estimate(config, [BatchShape((100, 60), 120)]).total < whole
    assert planner.estimate(config, [BatchShape(TEXT.lengths, 10)]).total < whole


def test_samples_that_share_a_row_are_simulated_together_without_changing_the_peak(
    make: Callable[..., TrainConfig], plugins: Plugins
) -> None:
    config = make(ADAPTED)
    planner = Planner(plugins, describe_model(config.model, plugins), "cpu")
    many, few = BatchShape((50,) * 16, 400), BatchShape((200,) * 4, 400)
    assert planner.estimate(config, [many]).total == planner.estimate(config, [few]).total
    positions = batch_inputs(planner._skeleton(config), config, many, 0)["position_ids"]
    assert (int((positions == 0).sum()), int(positions.max()), positions.shape[1]) == (4, 49, 800)


@pytest.mark.parametrize("own", [{"sliding_window": 100}, {"attention_dropout": 0.1}], ids=["window", "dropout"])
def test_samples_whose_scores_are_kept_whole_are_simulated_apart(
    own: dict[str, Any], make: Callable[..., TrainConfig], plugins: Plugins
) -> None:
    config = make(ADAPTED)
    skeleton = Planner(plugins, describe_model(config.model, plugins), "cpu")._skeleton(config)
    for name, value in own.items():
        setattr(skeleton.model.llm.config, name, value)
    positions = batch_inputs(skeleton, config, BatchShape((50,) * 16, 400), 0)["position_ids"]
    assert int((positions == 0).sum()) == 16


def test_accumulated_gradients_are_there_while_the_next_batch_is_computed(
    make: Callable[..., TrainConfig], plugins: Plugins
) -> None:
    once, twice = make(FULL), make(FULL, optim={"accumulate": 2})
    planner = Planner(plugins, describe_model(once.model, plugins), "cpu")
    first, second = (planner.estimate(config, [TEXT]).step for config in (once, twice))
    assert first and second and second.working > first.working + first.gradients // 2


def test_cuda_keeps_a_byte_of_each_dropout_mask_and_a_cpu_four(
    make: Callable[..., TrainConfig], plugins: Plugins
) -> None:
    config = make(ADAPTED)
    shape = describe_model(config.model, plugins)
    steps = [Planner(plugins, shape, target).estimate(config, [TEXT]).step for target in ("cpu", "cuda")]
    assert steps[0] and steps[1] and steps[1].saved < steps[0].saved


def test_rows_of_new_tokens_are_counted(make: Callable[..., TrainConfig], plugins: Plugins) -> None:
    config = make({**ADAPTED, "new_tokens": ("<one>", "<two>")})
    shape = describe_model(config.model, plugins)
    planner = Planner(plugins, shape, "cpu")
    memory = planner.estimate(config, [BatchShape((8,), 4)])
    real = built(config, plugins, shape, planner)
    assert memory.trained["llm"] == sum(p.numel() for p in real.llm.parameters() if p.requires_grad)
