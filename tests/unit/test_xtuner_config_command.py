"""`mmft convert xtuner-config` and the ways that lead to it; what it writes loads, checks and is in house style."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from xtuner_configs import IMPORTS, LLAVA, TEXT, said

from mmft.cli.convert_xtuner import xtuner_config
from mmft.config.check import find_problems
from mmft.config.foreign import is_xtuner_config
from mmft.config.load import list_configs, load_config
from mmft.convert.xtuner.config import translate
from mmft.errors import ConfigError, UnknownName


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
    assert "next: mend in old_mmft.py what stands under 'mmft check finds'; then mmft check old_mmft.py" in done.output
    assert "nothing to do by hand" not in done.output
    assert "  - XTuner counts batches, mmft optimizer steps: intervals are divided by accumulate=" in done.output
    assert "packing" in done.output
    again = CliRunner().invoke(xtuner_config, ["old.py"], standalone_mode=False)
    assert "exists already" in str(again.exception)
    Path("old.py").write_text(IMPORTS + TEXT.replace("openai_map_fn,", "mine,"), "utf-8")
    done = CliRunner().invoke(xtuner_config, ["old.py", "new.py"], standalone_mode=False)
    assert done.return_value == 1
    assert "to do by hand" in done.output


def test_weights_of_xtuners_come_with_the_whole_command_that_brings_them(converted, tmp_path):
    made, _ = converted(LLAVA)
    command = "mmft convert import ./work_dirs/my_pretrain/iter_2181.pth work_dirs/my_pretrain/projector"
    assert f'{command}, and set STAGE1 = Path("work_dirs/my_pretrain/projector")' in said(made)
    made, _ = converted(TEXT, ("load_from = None", "load_from = 'a.pth'"))
    assert f"mmft convert pth_to_hf {tmp_path / 'old.py'} a.pth work_dirs/old_start" in said(made)


@pytest.mark.parametrize(
    ("encoding", "remedy"), [("gbk", "iconv -f GB18030 -t UTF-8"), ("cp1251", "where it was written")]
)
def test_a_config_that_is_not_utf8_is_told_with_its_line_and_the_remedy(tmp_path, plugins, encoding, remedy):
    text = {"gbk": "'介绍一下你自己'", "cp1251": "'Привет! Как'"}[encoding]
    path = tmp_path / "old.py"
    path.write_bytes((IMPORTS + f"\nx = {text}\n").encode(encoding))
    line = (IMPORTS + "\nx").count("\n") + 1
    with pytest.raises(
        ConfigError, match=rf"old.py:{line}: .* its text is not UTF-8; save the file as UTF-8.*{remedy}"
    ):
        translate(path, plugins)


def test_a_config_that_declares_its_encoding_is_read_in_it(tmp_path, plugins):
    path = tmp_path / "old.py"
    path.write_bytes(("# -*- coding: gbk -*-\n" + IMPORTS + TEXT.replace("openai_map_fn,", "mine,")).encode("gbk"))
    assert "mine" in said(translate(path, plugins))
