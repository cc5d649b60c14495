"""What `check_plugin` refuses: each case is a plugin with one fault, and a `PluginError` in one line that names it."""

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mmft.errors import PluginError
from mmft.testing import check_plugin

Install = Callable[..., Path]

WHOLE = """
from pathlib import Path

from mmft import (
    BadRecord, ChatTemplate, ConfigDir, Conversation, DataMap, DatasetSpec, Image, Message, ProjectorSpec, Segment,
    Text, VisionEncoderSpec, VisionInfo, hookimpl,
)
from mmft.images import ImageTransform

END = "<|eot|>"


def render(conversation, /, *, generation_prompt=False):
    segments = []
    for message in conversation.messages:
        segments.append(Segment(f"<|{message.role}|>", markup=True))
        for part in message.parts:
            segments.append(Segment(part if isinstance(part, Image) else part.text, loss=message.is_trained))
        segments.append(Segment(END, loss=message.is_trained, markup=True))
    return segments + ([Segment("<|assistant|>", markup=True)] if generation_prompt else [])


@hookimpl
def mmft_chat_templates():
    return [ChatTemplate(name="acme", render=render, stop=(END,))]


def ask(record):
    return Conversation((Message("user", (Text(record["q"]),)), Message("assistant", (Text(record["a"]),))))


@hookimpl
def mmft_data_maps():
    return [DataMap(name="acme_qa", fn=ask, examples=({"q": "1", "a": "2"},))]


def describe(*, size=16):
    transform = ImageTransform(resize=(size, size), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return VisionInfo(hidden_size=12, num_patches=(size // 8) ** 2, transform=transform)


def build(*, size=16):
    import torch

    class Patches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 12, 8, 8)

        def forward(self, pixels):
            return self.conv(pixels).flatten(2).transpose(1, 2)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Patches()


@hookimpl
def mmft_vision_encoders():
    return [VisionEncoderSpec(name="acme_vit", describe=describe, build=build)]


def num_tokens(num_patches, *, queries=20):
    if queries > num_patches:
        raise ValueError(f"queries={queries}, but there are {num_patches} patches")
    return queries


def project(i, o, *, queries=20):
    import torch

    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(i, o)

        def forward(self, features):
            pooled = torch.nn.functional.adaptive_avg_pool1d(features.transpose(1, 2), queries)
            return self.linear(pooled.transpose(1, 2))

    return Pooled()


@hookimpl
def mmft_projectors():
    return [ProjectorSpec(name="acme_pool", build=project, num_tokens=num_tokens)]


def files(path):
    return [Path(path)]


def load_from(start, path):
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines()):
        if number >= start:
            q, bar, a = line.partition("|")
            yield {"q": q, "a": a} if bar else BadRecord("no bar")


def load(path):
    return load_from(0, path)


@hookimpl
def mmft_datasets():
    return [DatasetSpec(name="acme_pipes", load=load, load_from=load_from, files=files, suffixes=(".pipe",))]


@hookimpl
def mmft_config_dirs():
    return [ConfigDir(path=Path(__file__).parent / "configs")]
"""
CONFIG = """
from mmft.config import LLM, Data, Dataset, Model, Optim, Runtime, TrainConfig, use

config = TrainConfig(
    model=Model(llm=LLM(path="llm", trainable=True)),
    data=Data(chat_template="acme", max_length=64, datasets=(Dataset(source=use("acme_pipes"), data_map="acme_qa"),)),
    optim=Optim(lr=1e-3, epochs=1),
    runtime=Runtime(output_dir="work"),
)
"""
Check = Callable[..., list[str]]


@pytest.fixture
def check(install: Install, tmp_path: Path) -> Check:
    """`check((old, new), ...)`: `check_plugin` of the whole plugin, in which these texts are replaced."""

    def check(
        *changes: tuple[str, str], config: str | None = CONFIG, given: Mapping[str, Any] | None = None
    ) -> list[str]:
        source = WHOLE
        for old, new in changes:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        site = install("acme-mmft", "1", {}, acme_mod=source)
        if config is not None:
            (site / "configs").mkdir()
            (site / "configs" / "acme_llm.py").write_text(config, "utf-8")
        (tmp_path / "two.pipe").write_text("1|2\n\n3|4\n", "utf-8")
        options = {"acme_pipes": {"path": str(tmp_path / "two.pipe")}} if given is None else given
        return check_plugin(importlib.import_module("acme_mod"), options)

    return check


def test_a_plugin_without_a_fault_conforms_and_every_offer_is_tried(check: Check, tmp_path: Path) -> None:
    folder = str(tmp_path / "site" / "acme-mmft" / "configs")
    assert sorted(check()) == sorted(["acme", "acme_qa", "acme_vit", "acme_pool", "acme_pipes", folder])


def test_what_has_options_without_a_default_is_named_only_when_they_are_given(check: Check) -> None:
    assert "acme_pipes" not in check(given={})


FAULTS: dict[str, tuple[str, str, str]] = {
    "an answer without its end": (
        "        segments.append(Segment(END, loss=message.is_trained, markup=True))\n",
        "",
        "the answer of turn 1 is not trained with its end, so the model would not stop: what is trained is 'A cat.', ",
    ),
    "an end that is not trained": (
        "Segment(END, loss=message.is_trained, markup=True)",
        "Segment(END, markup=True)",
        "the answer of turn 1 is not trained with its end",
    ),
    "no stop": (", stop=(END,)", "", "chat template 'acme': it has no stop; give the strings that end an answer"),
    "a template that raises": (
        "    segments = []\n",
        "    segments = {}['none']\n",
        "chat template 'acme': KeyError: 'none' (acme_mod.py:14)",
    ),
    "a template that prints prompts with a space": ('"<|assistant|>"', '"<|assistant|> "', "not a prefix"),
    "a map that raises": (
        'record["q"]',
        'record["question"]',
        "data map 'acme_qa', on its example {'q': '1', 'a': '2'}: KeyError: 'question' (acme_mod.py:29)",
    ),
    "a map that returns its record": (
        "return Conversation((",
        "return list((",
        "acme_qa' gave a list, expected a Conversation",
    ),
    "a role that is none": (
        'Message("user"',
        'Message("human"',
        "data map 'acme_qa' gave a message with the role 'human'",
    ),
    "a text instead of parts": (
        '(Text(record["a"]),)',
        'record["a"]',
        "gave a message whose parts are a str, expected",
    ),
    "an encoder with a patch more than it says": (
        "num_patches=(size // 8) ** 2",
        "num_patches=(size // 8) ** 2 - 1",
        "vision encoder 'acme_vit': its module made [1, 4, 12] of one picture, expected [1, 3, 12]: describe says ",
    ),
    "an encoder that is no module": (
        "        return Patches()",
        "        return Patches().forward",
        "vision encoder 'acme_vit': build gave a method, expected a torch.nn.Module",
    ),
    "an encoder that fails on a picture": (
        "self.conv(pixels)",
        "self.konv(pixels)",
        "vision encoder 'acme_vit': its module",
    ),
    "an encoder that is another one each time": (
        "        torch.manual_seed(0)\n",
        "        torch.seed()\n",
        "vision encoder 'acme_vit': built twice it gives other features; a frozen encoder is not saved",
    ),
    "other options for describe than for build": (
        "def describe(*, size=16):",
        "def describe(*, size=16, patch=8):",
        "vision encoder 'acme_vit': describe takes patch, size, build size; both take the same",
    ),
    "a transform that cannot travel": (
        "transform=transform)",
        "transform=lambda image: transform(image))",
        "vision encoder 'acme_vit': the transform of describe: must pickle",
    ),
    "describe gives no VisionInfo": (
        "return VisionInfo(",
        "return dict(",
        "vision encoder 'acme_vit': describe gave a dict, expected a VisionInfo",
    ),
    "describe that raises": (
        "    transform = ImageTransform(",
        "    1 / 0\n    transform = ImageTransform(",
        "vision encoder 'acme_vit': describe: ZeroDivisionError: division by zero (acme_mod.py:38)",
    ),
    "a projector of another width": (
        "Linear(i, o)",
        "Linear(i, o + 1)",
        "projector 'acme_pool': its module made [1, 20, 129] of one picture, expected [1, 20, 128]: build was asked",
    ),
    "a projector of other tokens": (
        "    return queries\n",
        "    return queries + 1\n",
        "projector 'acme_pool': its module made [1, 20, 128] of one picture, expected [1, 21, 128]",
    ),
    "a projector of no number of tokens": (
        "    return queries\n",
        "    return queries / 2\n",
        "projector 'acme_pool': num_tokens(64) gave 10.0, expected a whole number above 0",
    ),
    "a projector that nothing fits": (
        "def num_tokens(num_patches, *, queries=20)",
        "def num_tokens(num_patches, *, queries=2000)",
        "projector 'acme_pool': num_tokens refuses 16, 64, 256, 576, 1024 patches: queries=2000, but",
    ),
    "a projector of numbers that are not finite": (
        "return self.linear(pooled.transpose(1, 2))",
        "return self.linear(pooled.transpose(1, 2)) / 0",
        "projector 'acme_pool': its module made numbers of one picture that are not finite",
    ),
    "a source that gives lists": (
        '{"q": q, "a": a} if bar',
        "[q, a] if bar",
        "data source 'acme_pipes': load: record 1 is a list, expected a dict or a BadRecord",
    ),
    "a source that gives nothing": (
        "    return load_from(0, path)",
        "    load_from(0, path)",
        "data source 'acme_pipes': load gave a NoneType, expected records one by one",
    ),
    "a source that raises": (
        "        if number >= start:",
        "        if number >= begin:",
        "data source 'acme_pipes': load: NameError: name 'begin' is not defined (acme_mod.py:95)",
    ),
    "a source that begins one too late": (
        "number >= start",
        "number >= 2 * start",
        "data source 'acme_pipes': load_from(1) does not give what load gives after the first 1",
    ),
    "a source that is another one each time": (
        '{"q": q, "a": a}',
        '{"q": q, "a": object()}',
        "data source 'acme_pipes': load gives other records the second time",
    ),
    "a source with other files": (
        "return [Path(path)]",
        "return [Path(path + '2')]",
        "data source 'acme_pipes': files names ",
    ),
    "a suffix without a dot": (
        '(".pipe",)',
        '("pipe",)',
        "data source 'acme_pipes': the suffix 'pipe' must begin with a dot and be in lower case",
    ),
    "a suffix for a source without a path": (
        "def load(path):\n    return load_from(0, path)",
        "def load(file):\n    return load_from(0, file)",
        "data source 'acme_pipes': it has suffixes, so load must take path",
    ),
    "a folder that is not there": ('/ "configs"', '/ "absent"', "absent: no such folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_offer(check: Check, fault: str) -> None:
    old, new, said = FAULTS[fault]
    with pytest.raises(PluginError, match=re.escape(said)) as caught:
        check((old, new))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, "configs: no such folder"),
        (CONFIG.replace("lr=1e-3", "lr='fast'"), "acme_llm.py:7: lr: input should be"),
        (CONFIG.replace("config =", "other ="), "must bind `config = TrainConfig(...)`"),
        ("import acme_core\n", "acme_llm.py:1: ModuleNotFoundError"),
    ],
)
def test_the_configs_of_a_folder_are_executed(check: Check, config: str | None, said: str) -> None:
    with pytest.raises(PluginError, match=re.escape(said)):
        check(config=config)


def test_options_of_a_name_that_is_not_offered_are_refused(check: Check) -> None:
    with pytest.raises(PluginError, match="it offers no 'acme_pipe' to give options to"):
        check(given={"acme_pipe": {"path": "x"}})
