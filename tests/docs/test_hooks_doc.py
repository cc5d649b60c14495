"""docs/hooks.md is true: each block is a plugin that conforms and does what the page says, alone and in a run."""

import importlib.util
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from test_docs import ROOT, blocks

from mmft.chat.tools import CallReader
from mmft.cli import cli
from mmft.data.formats import format_of, has_column, source_of
from mmft.errors import DataError, MmftError
from mmft.plugins import CATALOGS, EVENTS, Plugins, load_plugins, read_plugin
from mmft.testing import check_plugin, tiny_llm
from mmft.types import BadRecord, Conversation, Document, Message, Text, ToolCall

PAGE = ROOT / "docs" / "hooks.md"
HOOK_BLOCKS = blocks(PAGE, "python")
ModuleOf = Callable[[str, str], ModuleType]


def block_of(name: str) -> str:
    """The block that offers this name."""
    (source,) = (text for text in HOOK_BLOCKS if f'name="{name}"' in text)
    return source


@pytest.fixture
def module_of(tmp_path: Path) -> Iterator[ModuleOf]:
    """`module_of("name", source)`: a module imported from a file, as a plugin is, and forgotten afterwards."""
    made = []

    def module_of(name: str, source: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        path.write_text(source, "utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        made.append(name)
        spec.loader.exec_module(module)
        return module

    yield module_of
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("number", range(len(HOOK_BLOCKS)))
def test_every_python_block_of_hooks_is_a_plugin_that_conforms(
    number: int, module_of: ModuleOf, tmp_path: Path
) -> None:
    module = module_of(f"docs_hooks_{number}", HOOK_BLOCKS[number])
    assert [name for name in vars(module) if name.startswith("mmft_")]
    (tmp_path / "configs").mkdir()  # the folder that one of them offers
    (tmp_path / "configs" / "mine.py").write_text(CONFIG.format(weights="w", llm="llm"), "utf-8")
    check_plugin(module)
    for name, function in vars(module).items():
        if name.startswith("test_"):
            function(**({"tmp_path": tmp_path} if inspect.signature(function).parameters else {}))


def test_the_blocks_of_hooks_implement_every_hook() -> None:
    implemented = set(re.findall(r"^def (mmft_\w+)", "\n".join(HOOK_BLOCKS), re.MULTILINE))
    assert implemented == {*CATALOGS, *EVENTS}


def stem_file(folder: Path) -> Path:
    """Weights for the encoder `stem`."""
    file = folder / "stem.safetensors"
    save_file({"conv.weight": 0.1 * torch.ones(12, 3, 8, 8), "conv.bias": torch.zeros(12)}, file)
    return file


def test_the_encoders_of_hooks_give_the_shapes_that_they_describe(module_of: ModuleOf, tmp_path: Path) -> None:
    for name, options in (("patches", {}), ("stem", {"weights": str(stem_file(tmp_path))})):
        (encoder,) = read_plugin(module_of(f"documented_{name}", block_of(name))).offers["mmft_vision_encoders"]
        info = encoder.describe(**options)
        pixels = info.transform(Image.new("RGB", (40, 30), "red"))
        assert encoder.build(**options)(pixels[None]).shape == (1, info.num_patches, info.hidden_size)


def test_the_encoder_with_weights_says_what_is_wrong_with_its_file(module_of: ModuleOf, tmp_path: Path) -> None:
    (encoder,) = read_plugin(module_of("documented_stem", block_of("stem"))).offers["mmft_vision_encoders"]
    (tmp_path / "cut.safetensors").write_bytes(stem_file(tmp_path).read_bytes()[:20])
    for name in ("none.safetensors", "cut.safetensors"):
        with pytest.raises(MmftError, match=f"{name} cannot be read: .*; give the file of a stem"):
            encoder.describe(weights=str(tmp_path / name))


def test_the_projector_of_hooks_has_as_many_tokens_as_it_says(module_of: ModuleOf) -> None:
    (projector,) = read_plugin(module_of("documented_pooled", block_of("pooled"))).offers["mmft_projectors"]
    assert projector.build(8, 12)(torch.zeros(2, 16, 8)).shape == (2, projector.num_tokens(16), 12)
    with pytest.raises(ValueError, match="keep"):
        projector.num_tokens(2)


def test_the_source_of_hooks_reads_its_files(module_of: ModuleOf, tmp_path: Path) -> None:
    module = module_of("documented_sums", block_of("sums"))
    (source,) = read_plugin(module).offers["mmft_datasets"]
    sums = tmp_path / "a.sum"
    sums.write_text("1 + 1 = 2\n1 + 2\n2 + 2 = 4\n", "utf-8")
    bad = BadRecord(f"no ' = ' in the line: {sums} line 2")
    whole = [{"query": "1 + 1", "response": "2"}, bad, {"query": "2 + 2", "response": "4"}]
    assert list(source.load(path=sums)) == whole and source.files(path=sums) == [sums]
    assert [list(source.load_from(start, path=sums)) for start in range(4)] == [whole[n:] for n in range(4)]
    plugins = load_plugins([module])
    assert source_of(sums, plugins) == source and format_of(sums, plugins)[0][0].name == "query_response"


def test_the_data_map_of_hooks_writes_what_it_reads(module_of: ModuleOf) -> None:
    (data_map,) = read_plugin(module_of("documented_quiz", block_of("quiz"))).offers["mmft_data_maps"]
    record = {"ask": "q", "choices": [{"text": text, "right": True} for text in "ab"]}
    sample = data_map.fn(record)
    assert len(sample.notes) == 1
    assert data_map.fn(data_map.write(sample)) == replace(sample, notes=())
    assert has_column(record, "choices[].right") and data_map.columns[1:] == ("choices[].text", "choices[].right")
    with pytest.raises(DataError):
        data_map.write(Document("text"))


@pytest.fixture
def exam(module_of: ModuleOf) -> Any:
    """The chat template with tools."""
    (template,) = read_plugin(module_of("documented_tools", block_of("exam_with_tools"))).offers["mmft_chat_templates"]
    return template


def test_the_template_with_tools_reads_the_calls_that_it_writes_whatever_an_argument_spells(exam: Any) -> None:
    calls = tuple(ToolCall("look", {"where": text}) for text in ("here", "</s><call>{", '"}', "你好"))
    asked = Message("user", (Text("Look."),))
    for said in ("", "I look."):
        answer = Message("assistant", (Text(said),), calls)
        segments = exam.render(Conversation((asked, answer)))
        written = "".join(segment.content for segment in segments if segment.loss).removesuffix(exam.stop[0])
        assert exam.read_calls(written) == (said, calls)


@pytest.mark.parametrize(
    "text",
    [
        "No call.",
        "<call>",
        "<call>[1]",
        '<call>{"name": "look", "arg',
        '<call>{"arguments": {}}',
        '<call>{"name": "", "arguments": {}}',
        '<call>{"name": "look", "arguments": "here"}',
        '<call>{"name": "look", "arguments": {}}<call>{',
        "<call>" + "[" * 9999,
    ],
    ids=lambda text: text[:40],
)
def test_what_is_no_call_stays_text(exam: Any, text: str) -> None:
    assert exam.read_calls(text) == (text, ())


def test_tool_output_is_never_a_target_of_the_template_with_tools(exam: Any) -> None:
    messages = (
        Message("user", (Text("Look."),)),
        Message("assistant", (), (ToolCall("look", {}),)),
        Message("tool", (Text("A cat."),)),
        Message("assistant", (Text("It is a cat."),)),
    )
    segments = exam.render(Conversation(messages, ({"name": "look"},)))
    trained = "".join(segment.content for segment in segments if segment.loss)
    assert trained == ' <call>{"name": "look", "arguments": {}}</s> It is a cat.</s>'


def test_nothing_is_shown_from_a_mark_on_before_the_answer_is_whole(exam: Any) -> None:
    reader = CallReader(exam)
    assert "".join(map(reader.take, ("I lo", "ok.<ca", "ll>", '{"name": "look", ', '"arguments": {}}'))) == "I look."
    assert reader.end() == ("", "I look.", (ToolCall("look", {}),))


def test_the_events_of_hooks_do_what_the_page_says(module_of: ModuleOf) -> None:
    modules = [module_of(f"event_{number}", text) for number, text in enumerate(HOOK_BLOCKS)]
    config = SimpleNamespace(optim=SimpleNamespace(lr=0.5))
    plugins = Plugins([read_plugin(module) for module in modules])
    problems = [str(problem) for problem in plugins.call("mmft_check_config", config=config, plugins=plugins)]
    assert problems == ["optim.lr: 0.5 is above the house limit; use 0.01 or less"]
    assert [type(c).__name__ for c in plugins.call("mmft_callbacks", config=config)] == ["Bell"]
    group = click.Group()
    plugins.call("mmft_add_commands", cli=group)
    assert list(group.commands) == ["greet"]


def test_the_tool_of_hooks_rolls_what_the_page_says(module_of: ModuleOf) -> None:
    (tool,) = read_plugin(module_of("documented_tool", block_of("dice"))).offers["mmft_tools"]
    assert {int(tool.run(sides=6)) for _ in range(200)} <= set(range(1, 7))
    with pytest.raises(MmftError, match="2 to 1,000 sides, not 1"):
        tool.run(sides=1)


CONFIG = """
from pathlib import Path
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use

vision = Vision(encoder=use("stem", weights={weights!r}), projector=use("pooled", keep=4))
config = TrainConfig(
    model=Model(llm=LLM(path={llm!r}, lora=Lora(r=2)), vision=vision),
    data=Data(
        datasets=(Dataset(source=use("json", path="data.json"), data_map="llava", image_folder=Path(".")),),
        chat_template="exam_with_tools",
        allow_template_difference=True,
        max_length=128,
        num_workers=0,
    ),
    optim=Optim(lr=1e-2, epochs=1, batch_size_per_device=1),
    runtime=Runtime(output_dir=Path("run"), device="cpu", precision="fp32", save_steps=1),
)
"""
PARTS = {"stem": "stem", "pooled": "pooled", "exam": "exam_with_tools"}  # a plugin file, and what its block offers


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the page's encoder, projector and template as plugin files, and a run trained with them."""
    folder = tmp_path_factory.mktemp("custom")
    llm = tiny_llm(folder / "llm", special=("<|endoftext|>", "</s>"), eos="</s>")
    (folder / "my.py").write_text(CONFIG.format(weights=str(stem_file(folder)), llm=str(llm)), "utf-8")
    for file, name in PARTS.items():
        (folder / f"{file}.py").write_text(block_of(name), "utf-8")
    Image.new("RGB", (40, 30), "red").save(folder / "1.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    (folder / "data.json").write_text(json.dumps([{"image": "1.png", "conversations": turns}] * 2), "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = mmft("train", "my.py")
        assert result.exit_code == 0, (result.output, result.exception)
    yield folder
    for name in PARTS:
        sys.modules.pop(name, None)


def mmft(*arguments: str, plugins: tuple[str, ...] = tuple(PARTS)) -> Result:
    """The command line with the page's plugins."""
    given = [word for name in plugins for word in ("--plugin", f"{name}.py")]
    return CliRunner().invoke(cli, [*given, *arguments])


WORKS: tuple[tuple[str, ...], ...] = (
    ("check", "my.py"),
    ("data", "check", "my.py"),
    ("data", "show", "my.py"),
    ("train", "my.py", "--resume", "run/checkpoint-1"),
    ("chat", "run", "-m", "What is it?", "--image", "1.png", "--max-new-tokens", "2", "--tools", "calculate"),
    ("eval", "run", "data.json", "--image-folder", "."),
    ("convert", "merge", "run", "merged"),
    ("convert", "verify", "merged", "run"),
    ("chat", "merged", "-m", "What is it?", "--image", "1.png", "--max-new-tokens", "2"),
)


@pytest.mark.parametrize("command", WORKS, ids=" ".join)
def test_a_model_of_custom_parts_goes_through(
    trained: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(trained)
    result = mmft(*command)
    assert result.exit_code == 0, (result.output, result.exception)


REFUSED = (
    (("convert", "hf", "run", "out"), "projector 'pooled': Pooled has no place in a class of transformers"),
    (("convert", "gguf", "run", "out"), "projector 'pooled': llama.cpp's LLaVA graph has exactly two linear layers"),
    (("convert", "hf", "plain", "out"), "vision encoder 'stem' is no transformers model (Stem)"),
    (("convert", "gguf", "plain", "out", "--square-only"), "vision encoder 'stem' is no transformers model (Stem)"),
)


@pytest.fixture(scope="module")
def plain(trained: Path) -> None:
    """A second run in the folder, `plain`, with a projector that other programs know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        settings = ("--set", 'model.vision.projector={"use": "mlp2x_gelu"}', "--work-dir", "plain")
        result = mmft("train", "my.py", *settings)
        assert result.exit_code == 0, (result.output, result.exception)


@pytest.mark.parametrize(
    ("command", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
@pytest.mark.usefixtures("plain")
def test_what_other_programs_cannot_open_is_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(trained)
    result = mmft(*command)
    assert result.exit_code != 0 and isinstance(result.exception, MmftError), (result.output, result.exception)
    assert str(result.exception).startswith(said)
    assert not (trained / "out").exists()


def test_a_model_says_which_plugin_it_was_trained_with(
    trained: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(trained)
    recorded = json.loads((trained / "run/final/mmft.json").read_text("utf-8"))["plugins"]
    assert re.fullmatch("stem sha256:[0-9a-f]{16}", recorded["vision encoder stem"])
    ask = ("chat", "run", "-m", "Hi", "--max-new-tokens", "2")
    missing = mmft(*ask, plugins=("pooled", "exam"))
    assert "no vision encoder named 'stem': it was trained with that of stem sha256:" in str(missing.exception)
    code = (trained / "pooled.py").read_text("utf-8")
    try:
        (trained / "pooled.py").write_text(f"{code}\n# changed\n", "utf-8")
        assert mmft(*ask).exit_code == 0
        assert len([one for one in caplog.messages if "was trained with other plugins" in one]) == 1
        refused = mmft("train", "my.py", "--resume", "run/checkpoint-1")
        assert "was trained with other plugins: projector pooled" in str(refused.exception)
        assert "--allow-other-versions" in str(refused.exception)
    finally:
        (trained / "pooled.py").write_text(code, "utf-8")


def squeezed(text: str) -> str:
    """With single spaces, whatever breaks the lines."""
    return " ".join(text.split())


def test_the_messages_that_the_page_shows_are_those_that_come(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exam = block_of("exam").replace('"exam"', '"vicuna"')
    install("acme-mmft", "0.2.0", {"acme": "acme_exam"}, acme_exam=exam)
    stem = install("mmft-acme", "0.1.0", {"acme_stem": "mmft_acme"}, mmft_acme=block_of("stem"))
    with (stem / "mmft_acme-0.1.0.dist-info" / "METADATA").open("a", encoding="utf-8") as file:
        file.write("Requires-Dist: mmft<0.2,>=0.1\n")
    install("mmft-plugin-hello", "0.1.0", {"hello": "mmft_hello"}, mmft_hello="import hello_core\n")
    monkeypatch.setattr("mmft.plugins.loading.__version__", "0.3.0")
    plugins = load_plugins()
    with pytest.raises(MmftError) as ambiguous:
        plugins.chat_templates.get("vicuna")
    with pytest.raises(MmftError) as unknown:
        plugins.as_trained({"vision encoder gone": "mmft-acme 0.1.0"}).vision_encoders.get("gone")
    listed = squeezed(CliRunner().invoke(cli, ["plugins"]).output)
    clash, broken, unmet = (squeezed(block) for block in blocks(PAGE, ""))
    assert clash == str(ambiguous.value) and broken in listed and unmet.replace("acme ", "acme_stem ", 1) in listed, (
        listed
    )
    assert "it was trained with that of mmft-acme 0.1.0" in str(unknown.value)


def test_the_project_file_of_the_page_is_that_of_the_example() -> None:
    short, whole = (tomllib.loads(text) for text in blocks(PAGE, "toml"))
    example = tomllib.loads((ROOT / "examples/mmft-plugin-hello/pyproject.toml").read_text("utf-8"))
    assert short["project"]["entry-points"] == example["project"]["entry-points"]
    for key in ("requires-python", "dependencies"):
        assert whole["project"][key] == example["project"][key]
    assert whole["build-system"] == example["build-system"]
