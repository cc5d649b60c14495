"""`mmft convert pth_to_hf`: the folders of DeepSpeed, ZeRO-1 to 3, as XTuner leaves them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from import_models import same_as, xtuner_config, xtuner_parts
from peft import set_peft_model_state_dict
from transformers import CLIPVisionModel

from mmft.convert.importing.config import read_target
from mmft.convert.importing.files import read_deepspeed
from mmft.convert.importing.importers import pth_to_hf
from mmft.errors import CheckpointError


@pytest.fixture(scope="module")
def shards(tmp_path_factory, tiny_llm_path, tiny_clip_path, environment) -> Path:
    """Checkpoints of ZeRO-1, 2 and 3 over two processes, written by DeepSpeed."""
    pytest.importorskip("deepspeed", reason="needs mmft[deepspeed]")
    folder = tmp_path_factory.mktemp("shards")
    *_, state = xtuner_parts(tiny_llm_path, tiny_clip_path)
    torch.save({key: value for key, value in state.items() if "visual_encoder" not in key}, folder / "weights.pt")
    script = Path(__file__).with_name("deepspeed_shards.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder],
        check=False, capture_output=True, text=True, timeout=540, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shards_of_deepspeed_are_put_together_to_the_bit(shards, stage):
    expected = torch.load(shards / f"stage-{stage}.whole.pt", weights_only=True)
    found = read_deepspeed(shards / f"stage-{stage}.pth")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    started = torch.load(shards / "weights.pt", weights_only=True)
    assert not any(torch.equal(found[name], tensor) for name, tensor in started.items()), "nothing was trained"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_folder_of_xtuner_becomes_a_model_that_gives_the_same(
    shards, stage, tmp_path, plugins, tiny_llm_path, tiny_clip_path
):
    config = xtuner_config(tmp_path, tiny_llm_path, tiny_clip_path, lora=True)
    target = read_target(str(config), plugins)
    pth_to_hf(shards / f"stage-{stage}.pth", tmp_path / "out", target=target, plugins=plugins)
    language, _, projector, _ = xtuner_parts(tiny_llm_path, tiny_clip_path)
    trained = torch.load(shards / f"stage-{stage}.whole.pt", weights_only=True)
    projector.load_state_dict(
        {key.removeprefix("projector.model."): value for key, value in trained.items() if key.startswith("projector")}
    )
    adapter = {key[4:].replace(".default", ""): value for key, value in trained.items() if key.startswith("llm.")}
    assert not set_peft_model_state_dict(language, adapter).unexpected_keys
    same_as(tmp_path / "out", plugins, language, CLIPVisionModel.from_pretrained(tiny_clip_path).eval(), projector)


def test_a_deepspeed_folder_with_a_shard_missing_or_cut_short_is_refused(shards, tmp_path):
    folder = tmp_path / "iter_2.pth"
    shutil.copytree(shards / "stage-2.pth", folder)
    second = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    second.unlink()
    with pytest.raises(CheckpointError, match="written by 2 processes, found the shards of 1; give all"):
        read_deepspeed(folder)
    shutil.copyfile(shards / "stage-3.pth" / second.name, second)
    with pytest.raises(CheckpointError, match=r"iter_2\.pth: its shards do not belong together"):
        read_deepspeed(folder)
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    shutil.copyfile(
        shards / "stage-3.pth" / "zero_pp_rank_0_mp_rank_00_model_states.pt", folder / "mp_rank_00_model_states.pt"
    )
    with pytest.raises(CheckpointError, match=r"holds no \*_optim_states\.pt"):
        read_deepspeed(folder)


@pytest.mark.parametrize(
    ("head", "shard", "words"),
    [
        ([{"a": (3,)}, {"b": (2,)}], {"single_partition_of_fp32_groups": [4]}, "2 groups of weights, 1 in its shards"),
        ([{"a": (3,)}], {"single_partition_of_fp32_groups": [2]}, "its shards end at 2 numbers, within a"),
        ([{"a": (3,)}], {"single_partition_of_fp32_groups": [9]}, "6 numbers of its shards belong to no weight"),
        ([{"a": (3,)}], {"fp32_flat_groups": [2]}, "its shards end at 2 numbers, within a"),
        ([{"a": (3,)}], {"fp32_flat_groups": [9]}, "6 numbers of its shards belong to no weight"),
    ],
)
def test_shards_that_do_not_hold_what_the_checkpoint_says_are_refused(tmp_path, head, shard, words):
    ((key, sizes),) = shard.items()
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in head]
    torch.save({"module": {}, "param_shapes": shapes}, tmp_path / "mp_rank_00_model_states.pt")
    state = {key: [torch.zeros(size) for size in sizes], "partition_count": 1}
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": state}, path)
    with pytest.raises(CheckpointError, match=words):
        read_deepspeed(tmp_path)


def test_files_that_are_none_of_deepspeed_are_named_with_what_they_lack(tmp_path):
    head, shard = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    groups = {"single_partition_of_fp32_groups": [torch.zeros(2)], "partition_count": 1}
    for contents, words in (
        (
            ({"weights": {}}, None),
            r"model_states\.pt: is no file of a DeepSpeed .*: it holds no table 'module'",
        ),
        (({"module": {}}, {"step": 1}), r"optim_states\.pt: .*holds no table 'optimizer_state_dict'"),
        (({"module": {}}, {"optimizer_state_dict": groups}), "its model states hold no param_shapes"),
    ):
        for path, content in zip((head, shard), contents, strict=True):
            torch.save(content, path) if content is not None else path.unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=words):
            read_deepspeed(tmp_path)
