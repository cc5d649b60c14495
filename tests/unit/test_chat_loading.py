"""Whatever a model is kept as, it is talked to in the same way."""

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from chat_models import SHORT
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForCausalLM, LlavaConfig
from transformers import LlavaForConditionalGeneration as HfLlava

from mmft import VisionEncoderSpec, hookimpl
from mmft.chat.loading import ModelChoice, load_choice
from mmft.chat.session import ChatSession
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.errors import MmftError, ModelError
from mmft.inference import Assistant
from mmft.modeling.checkpoint import write_manifest
from mmft.plugins import Plugins, load_plugins
from mmft.testing import save_image_processor, tiny_llm, tiny_vision

CPU = {"device": "cpu"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llm(tmp_path_factory.mktemp("models") / "llm")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    PILImage.effect_noise((30, 20), 90).convert("RGB").save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def load(plugins: Plugins, **choice: Any) -> Assistant:
    return load_choice(
        ModelChoice(**{**CPU, **{k: v if k == "select_layer" else str(v) for k, v in choice.items()}}), plugins
    )[1]


def answers(assistant: Assistant, *images: Path) -> list[str]:
    session = ChatSession(assistant, SHORT)
    return ["".join(session.ask("What is it?", images)), "".join(session.ask("And?"))]


def test_a_text_model_of_transformers_answers_as_its_own_generate(llm: Path, plugins: Plugins) -> None:
    assistant = load(plugins, model=llm)
    session = ChatSession(assistant, SHORT)
    written = "".join(session.ask("Hello"))
    hf, tokenizer = AutoModelForCausalLM.from_pretrained(llm), assistant.shape.tokenizer.hf
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    theirs = hf.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert written == tokenizer.decode(theirs, skip_special_tokens=True).lstrip()


def test_a_base_model_needs_a_template_by_name(tmp_path: Path, plugins: Plugins) -> None:
    tiny_llm(tmp_path / "base", chat_template="")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(MmftError, match=r"the tokenizer has no chat_template .*; for chat: --prompt-template NAME"):
        load(plugins, model=tmp_path / "base")
    assert load(plugins, model=tmp_path / "base", prompt_template="vicuna").template.name == "vicuna"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_model_is_computed_in_the_dtype_asked_for(llm: Path, plugins: Plugins, dtype: str) -> None:
    assistant = load(plugins, model=llm, dtype=dtype)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {p.dtype for p in assistant.model.parameters()} == {expected}
    answers(assistant)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_model_is_loaded_in_so_many_bits(llm: Path, plugins: Plugins, bits: str) -> None:
    import bitsandbytes as bnb

    assistant = load(plugins, model=llm, bits=bits)
    kind = {"4": bnb.nn.Linear4bit, "8": bnb.nn.Linear8bitLt}[bits]
    assert sum(isinstance(module, kind) for module in assistant.model.modules()) == 14
    answers(assistant)


@pytest.fixture(scope="module")
def adapter(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter that changes every answer, and the base it names."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llm), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


def test_an_adapter_is_put_on_its_base(llm: Path, adapter: Path, plugins: Plugins) -> None:
    base, expected = answers(load(plugins, model=llm)), answers(load(plugins, model=llm, adapter=adapter))
    assert base != expected
    assert answers(load(plugins, adapter=adapter)) == expected  # on the base that it names
    assert answers(load(plugins, model=adapter)) == expected  # as a model of its own
    assert answers(load(plugins, model=adapter, llm=llm)) == expected


def test_an_adapter_of_another_model_is_one_line(adapter: Path, tmp_path: Path, plugins: Plugins) -> None:
    other = tiny_llm(tmp_path / "other", width=64)
    with pytest.raises(MmftError, match=r"^--adapter .*: .*size mismatch|^--adapter .*: Error") as raised:
        load(plugins, model=other, adapter=adapter)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def hf_llava(llm: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA in transformers' own form, with a token of its own for pictures."""
    folder = tmp_path_factory.mktemp("llava")
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
    text = AutoConfig.from_pretrained(tiny_llm(folder, special=special))
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(clip), text_config=text, image_token_index=3, vision_feature_layer=-2
    )
    torch.manual_seed(0)
    HfLlava(config).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    save_image_processor(folder, "CLIPImageProcessor", size={"shortest_edge": 28}, crop_size=size)
    return folder


def test_transformers_llava_answers_as_its_own_generate(hf_llava: Path, plugins: Plugins, picture: Path) -> None:
    assistant = load(plugins, model=hf_llava, prompt_template="chatml")
    session = ChatSession(assistant, SHORT)
    written = "".join(session.ask("What is it?", [picture]))
    prompt = assistant.prompt(type(session.conversation)(session.conversation.messages[:1]))
    ids = torch.from_numpy(prompt.input_ids.astype("int64"))[None]
    pixels = AutoImageProcessor.from_pretrained(hf_llava, backend="pil")(
        PILImage.open(picture), return_tensors="pt"
    ).pixel_values
    hf = HfLlava.from_pretrained(hf_llava)
    theirs = hf.generate(
        input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        eos_token_id=assistant.shape.tokenizer.eos_id,
    )[0, ids.shape[1] :]  # fmt: skip
    assert written == assistant.shape.tokenizer.hf.decode(theirs, skip_special_tokens=True).lstrip()
    assert (ids == 3).sum() == 16


def test_llava_whose_own_template_cannot_be_used_is_told_of_another(hf_llava: Path, plugins: Plugins) -> None:
    """That of llava-hf writes the typed parts of a processor, and no control token at the end of an answer."""
    own = hf_llava / "chat_template.jinja"
    before = own.read_text("utf-8")
    own.write_text("{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}", "utf-8")
    try:
        with pytest.raises(MmftError, match=r"; for chat: --prompt-template NAME \(vicuna for LLaVA-1\.5\)$"):
            load(plugins, model=hf_llava)
    finally:
        own.write_text(before, "utf-8")


def test_transformers_llava_has_memory_and_several_pictures(hf_llava: Path, plugins: Plugins, picture: Path) -> None:
    assistant = load(plugins, model=hf_llava, prompt_template="chatml")
    session = ChatSession(assistant, SHORT)
    list(session.ask("Compare", [picture, picture]))
    list(session.ask("And?"))
    assert session.usage is not None
    assert session.usage.reused_tokens > 32


def test_only_the_language_model_of_llava_is_quantised(hf_llava: Path, plugins: Plugins, picture: Path) -> None:
    assistant = load(plugins, model=hf_llava, prompt_template="chatml", bits=4)
    small = {name for name, module in assistant.model.llm.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(small) == 14 and all(".language_model." in name for name in small)
    answers(assistant, picture)


@pytest.fixture(scope="module")
def projector(llm: Path, plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("projector") / "projector.safetensors"
    save_file(plugins.projectors.get("mlp2x_gelu").build(32, 32).state_dict(), file)
    return file


def test_parts_make_a_model_that_sees(
    llm: Path, clip: Path, projector: Path, plugins: Plugins, picture: Path, adapter: Path
) -> None:
    parts = {"llm": llm, "vision_encoder": clip, "projector": projector}
    assistant = load(plugins, **parts)
    assert assistant.sees and assistant.shape.tokenizer.tokens_per_image == 16
    seen = answers(assistant, picture)
    assert seen == answers(load(plugins, **{**parts, "projector": projector.parent}), picture)
    assert seen != answers(load(plugins, **parts, adapter=adapter), picture)


def test_missing_parts_and_a_projector_that_does_not_fit_are_one_line(
    llm: Path, clip: Path, projector: Path, plugins: Plugins, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"needs --llm, --vision-encoder and --projector; missing: --projector$"):
        load(plugins, llm=llm, vision_encoder=clip)
    with pytest.raises(ModelError, match=r"^--projector .*nowhere: no such file; give a \.safetensors file"):
        load(plugins, llm=llm, vision_encoder=clip, projector=tmp_path / "nowhere")
    other = tiny_llm(tmp_path / "wider", width=64)
    with pytest.raises(ModelError, match=r"no projector from 32 \(the encoder\) to 64 .* has its weights \(0\.bias"):
        load(plugins, llm=other, vision_encoder=clip, projector=projector)


@pytest.mark.parametrize(("hub_option", "error"), [("folder", None), (None, "'own' reads no such folder")])
def test_an_encoder_gets_its_folder_in_the_option_that_it_names(
    hub_option: str | None, error: str | None, llm: Path, clip: Path, projector: Path, tmp_path: Path
) -> None:
    theirs = load_plugins().vision_encoders.get("clip")

    @hookimpl
    def mmft_vision_encoders() -> list[VisionEncoderSpec]:
        def describe(*, folder: str) -> Any:
            return theirs.describe(path=folder)

        def build(*, folder: str) -> Any:
            return theirs.build(path=folder)

        return [VisionEncoderSpec(name="own", describe=describe, build=build, hub_option=hub_option)]

    own = ModuleType("own")
    own.mmft_vision_encoders = mmft_vision_encoders  # type: ignore[attr-defined]
    plugins = load_plugins([own])
    vision = Vision(encoder=use("own", folder="gone"), projector=use("mlp2x_gelu"))
    dataset = Dataset(source=use("json", path="gone.json"), data_map="llava")
    data = Data(datasets=(dataset,), max_length=64, chat_template="vicuna")
    config = TrainConfig(
        model=Model(llm=LLM(path=str(llm)), vision=vision), data=data,
        optim=Optim(lr=1e-3, max_steps=1, batch_size_per_device=1), runtime=Runtime(output_dir=tmp_path),
    )  # fmt: skip
    write_manifest(tmp_path, config, plugins, "fp32")
    shutil.copy(projector, tmp_path)
    parts = {"llm": llm, "vision_encoder": clip, "projector": tmp_path}
    if error is None:
        assert load(plugins, **parts).sees
    else:
        with pytest.raises(ModelError, match=error):
            load(plugins, **parts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", r"'nobody/nothing' is no folder and was not found on huggingface"),
        ("./nowhere", r"\./nowhere does not exist; give a run's folder"),
        ("EMPTY", r"holds no model"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(name: str, message: str, tmp_path: Path, plugins: Plugins) -> None:
    with pytest.raises(MmftError, match=message) as raised:
        load(plugins, model=tmp_path if name == "EMPTY" else name)
    assert "\n" not in str(raised.value)


def test_a_model_of_another_kind_is_refused_by_its_name(tmp_path: Path, plugins: Plugins) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "whisper"}), "utf-8")
    with pytest.raises(MmftError) as raised:
        load(plugins, model=tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_device_that_is_not_there_is_one_line(llm: Path, plugins: Plugins) -> None:
    with pytest.raises(ModelError, match="--device cuda: this machine has none that torch can use"):
        load(plugins, model=llm, device="cuda")


def test_an_option_that_would_do_nothing_is_refused(llm: Path, adapter: Path, plugins: Plugins) -> None:
    for option in ({"llm": llm}, {"select_layer": -1}):
        with pytest.raises(ModelError, match=f"^--{next(iter(option)).replace('_', '-')}: .* is a whole model; leave"):
            load(plugins, model=llm, **option)
    with pytest.raises(ModelError, match=r"^--adapter: .* is an adapter itself"):
        load(plugins, model=adapter, adapter=adapter)
    with pytest.raises(ModelError, match=r"^--select-layer: .* is an adapter of a language model"):
        load(plugins, adapter=adapter, select_layer=-1)
