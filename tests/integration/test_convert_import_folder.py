"""The folder that XTuner's `pth_to_hf` wrote, which its chat took as `--llava`: one command, then `mmft chat`."""

import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from import_models import same_as, xtuner_config, xtuner_parts
from safetensors.torch import save_file

from mmft.cli import cli
from mmft.cli.from_xtuner import option_advice
from mmft.plugins import Plugins


def test_the_command_that_chat_answers_llava_with_makes_a_model_that_gives_the_same(
    tmp_path: Path, plugins: Plugins, tiny_llm_path: Path, tiny_clip_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language, vision, projector, _ = xtuner_parts(tiny_llm_path, tiny_clip_path)
    source = tmp_path / "LLAVA"
    language.save_pretrained(source / "llm_adapter")
    vision.save_pretrained(source / "visual_encoder_adapter")
    (source / "projector").mkdir()
    state = {f"model.{key}": value.detach() for key, value in projector.state_dict().items()}
    save_file(state, source / "projector" / "model.safetensors", {"format": "pt"})
    (source / "projector" / "config.json").write_text('{"model_type": "projector"}', "utf-8")
    config = xtuner_config(tmp_path, tiny_llm_path, tiny_clip_path, lora=True)
    config.rename(source / "xtuner_config.py")
    monkeypatch.chdir(tmp_path)
    lines = [part for part in option_advice("chat", "--llava").split("`") if part.startswith("mmft ")][1:]
    assert [line.split()[1] for line in lines] == ["convert", "chat"]
    for line in (lines[0], f"{lines[1]} -m Hi --max-new-tokens 2"):
        done = CliRunner().invoke(cli, shlex.split(line)[1:], standalone_mode=False)
        assert done.exception is None, done.output
    with torch.no_grad():
        same_as(tmp_path / "OUT", plugins, language, vision, projector)
