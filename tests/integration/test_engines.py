"""Over several processes every engine gives one process's losses, gradients and weights; saving, resuming, errors."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from engine_runs import STEPS, config_for, run
from PIL import Image
from safetensors.torch import load_file

from mmft.cli import cli
from mmft.config import override
from mmft.convert.importing.files import read_deepspeed
from mmft.data.sampler import StepSampler
from mmft.errors import CheckpointError
from mmft.inference import load_assistant
from mmft.modeling.checkpoint import read_manifest
from mmft.ranks import free_port
from mmft.testing import tiny_llm, tiny_vision

RECORDS = 32
PICTURES = {n for n in range(RECORDS) if n % 4 == 0}

ZERO1, ZERO2, ZERO3 = ({"deepspeed": name} for name in ("zero1", "deepspeed_zero2", "zero3"))
FSDP, DDP = {"fsdp": True}, {}
KINDS = {
    "text": {"sees": False, "lora": False},
    "text-lora": {"sees": False, "lora": True},
    "llava": {"sees": True, "lora": False},
    "llava-lora": {"sees": True, "lora": True},
    "packed": {"sees": True, "lora": False, "packing": True},
}
# each engine, full and LoRA, text and LLaVA; what is resumed was saved after two of four steps. DeepSpeed comes last:
# ZeRO-3 replaces functions of torch for the rest of the process
RUNS = {
    "ddp": ("llava", DDP),
    "ddp-1x4": ("text-lora", {"micro": 1}),
    "fsdp": ("llava", FSDP),
    "fsdp-lora": ("llava-lora", FSDP),
    "ulysses": ("llava", {"sequence_parallel": 2}),
    "ulysses-packed": ("packed", {"sequence_parallel": 2}),
    "zero1": ("text", ZERO1),
    "zero2": ("llava-lora", ZERO2),
    "zero2-offload": ("text", {"deepspeed": "zero2_offload"}),
    "zero3": ("llava", ZERO3),
    "zero3-offload": ("llava-lora", {"deepspeed": "zero3_offload"}),
}
RESUMED = ("ddp", "fsdp", "zero2", "zero3")
ASKED = {  # one step, and two questions before and after it
    "runtime.sample_steps": 1,
    "runtime.samples": [{"text": "What is it?", "images": ["red.png"]}, {"text": "count to 1"}],
    "optim.max_steps": 1,
}
WORSE = {  # evaluated on what the training makes ever less likely
    "optim.lr": 2e-2,
    "runtime.evaluation": {"steps": 1, "keep_best": True, "final": "best", "patience": 1},
    "runtime.report_to": ["tensorboard"],
}
BROKEN = {"optim.lr": 1e37}  # step 1 ruins the weights, step 2 finds out: by its loss with LoRA, else by gradients
SPECIAL = {
    "asked-fsdp": ("llava", FSDP, ASKED),
    "worse-ddp": ("text", DDP, WORSE),
    "worse-fsdp": ("text", FSDP, WORSE),
    "broken-ddp": ("text", DDP, BROKEN),
    "broken-fsdp": ("text-lora", FSDP, BROKEN),
    "broken-zero2": ("text-lora", ZERO2, BROKEN),
    "asked-zero3": ("llava", ZERO3, ASKED),
    "broken-zero3": ("text-lora", ZERO3, BROKEN),
}
WHOLE_STEP = {"optim.max_steps": 1, "runtime.save_steps": 1000}  # all 32 records in one optimizer step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, and 32 records of answers of 1 to 7 words; in llava.json every fourth has a picture."""
    folder = tmp_path_factory.mktemp("engines")
    tiny_llm(folder / "llm")
    tiny_vision(folder / "clip")
    Image.new("RGB", (40, 30), "red").save(folder / "red.png")
    for name in ("text", "llava"):
        records = []
        for n in range(RECORDS):
            sees = name == "llava" and n in PICTURES
            question = ("<image>\n" if sees else "") + f"count to {n}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "one " * (1 + n % 7)}]
            records.append({"conversations": turns} | ({"image": "red.png"} if sees else {}))
        (folder / f"{name}.json").write_text(json.dumps(records))
    turns = [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "ZQXJ9KV%W7" * 12}]
    (folder / "other.json").write_text(json.dumps([{"conversations": turns}] * 3))
    return folder


def special(folder, changes):
    """Changes of a config with the paths of this session's folder."""
    changes = json.loads(json.dumps(changes))
    for prompt in changes.get("runtime.samples", ()):
        prompt["images"] = [str(folder / name) for name in prompt.get("images", ())]
    if "runtime.evaluation" in changes:
        source = {"name": "json", "options": {"path": str(folder / "other.json")}}
        changes["data.validation"] = [{"source": source, "data_map": "llava"}]
    return changes


@pytest.fixture(scope="module")
def alone(folder):
    """The four runs in this one process: batches of 2 samples, 4 a step."""
    return {kind: run(config_for(folder, f"alone-{kind}", 1, engine={}, **wanted)) for kind, wanted in KINDS.items()}


@pytest.fixture(scope="module")
def two_ranks(folder, environment):
    """All runs over two ranks, in one torchrun; an unfinished one is an error with its output."""
    step = {**WHOLE_STEP, "optim.batch_size_per_device": 1, "optim.accumulate": 16}
    plan = {"one-step": {"sees": True, "lora": False, "engine": {}, "set": step}}
    for name, (kind, engine) in RUNS.items():
        plan[name] = {**KINDS[kind], "engine": engine}
        if name in RESUMED:
            plan[f"{name}-resumed"] = {**plan[name], "resume": name}
    own = {name: {**KINDS[kind], "engine": engine, "set": special(folder, changes)}
           for name, (kind, engine, changes) in SPECIAL.items()}  # fmt: skip
    early = {name: wanted for name, wanted in own.items() if "zero" not in name}
    plan = early | plan | own  # those of DeepSpeed come behind all others
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    driver = str(Path(__file__).with_name("engine_runs.py"))
    done = subprocess.run(
        [*command, driver, str(folder), json.dumps(plan)],
        check=False, capture_output=True, text=True, timeout=900, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "built successfully" not in done.stdout, "DeepSpeed speaks of its own kernels, from every process"
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_the_losses_and_gradient_norms_of_one(name, two_ranks, alone):
    """float32 sums in another order: the worst relative difference seen over all runs is 4e-6 of the loss."""
    expected, got = alone[RUNS[name][0]], two_ranks[name]
    assert got["code"] == 0
    assert len(got["loss"]) == STEPS
    assert got["loss"] == pytest.approx(expected["loss"], rel=5e-5)
    assert got["norm"] == pytest.approx(expected["norm"], rel=1e-3)
    assert expected["loss"][0] > expected["loss"][-1], "a curve that does not fall shows nothing"


def test_the_loss_is_the_mean_over_the_step_however_many_ranks_and_micro_batches_share_it(two_ranks, folder):
    """32 samples of 1 to 7 words, eight with a picture: 1, 2, 8 and 32 micro-batches on one rank, 2 x 16 on two."""
    seen = {}
    for accumulate in (1, 2, 8, 32):
        config = config_for(folder, f"step-{accumulate}", 1, sees=True, lora=False, engine={})
        cut = {**WHOLE_STEP, "optim.accumulate": accumulate, "optim.batch_size_per_device": RECORDS // accumulate}
        told = run(override(config, cut))
        seen[accumulate] = (told["loss"][0], told["norm"][0])
    for accumulate in (1, 2, 8):
        assert seen[accumulate] == pytest.approx(seen[32], rel=1e-5), seen
    assert (two_ranks["one-step"]["loss"][0], two_ranks["one-step"]["norm"][0]) == pytest.approx(seen[32], rel=1e-5)


def test_there_were_steps_where_one_rank_had_a_picture_and_the_other_only_text():
    """What the runs above would hang in, or lose gradients by, is really in them."""
    lengths, has_image = np.ones(RECORDS, np.int64), np.array([n in PICTURES for n in range(RECORDS)])
    order = StepSampler(lengths, has_image, 8, seed=42).order(0).reshape(-1, 2, 2)  # step and micro-batch, rank, sample
    seen = has_image[order].any(axis=2)
    assert (seen[:, 0] != seen[:, 1]).any()


@pytest.mark.parametrize("name", RUNS)
def test_the_engine_steps_with_the_rates_and_decays_of_the_parts(name, two_ranks, alone):
    expected = alone[RUNS[name][0]]["groups"]
    assert [tuple(group) for group in two_ranks[name]["groups"]] == expected
    if RUNS[name][0] == "llava-lora":
        assert len({lr for _, lr, _ in expected}) == 3, "llm, projector and vision have rates of their own"


def test_the_weights_are_really_sharded(two_ranks):
    """accelerate's FSDP plugin would give DDP here without a word."""
    assert two_ranks["fsdp"]["weight"] == "DTensor"
    assert two_ranks["fsdp"]["held"] * 2 == two_ranks["fsdp"]["whole"]
    assert two_ranks["zero3"]["held"] == 0 < two_ranks["zero3"]["whole"]
    assert two_ranks["zero3"]["optimizer"] == "DeepSpeedZeroOptimizer_Stage3"
    assert two_ranks["zero2"]["optimizer"] == two_ranks["zero1"]["optimizer"] == "DeepSpeedZeroOptimizer"
    assert two_ranks["ddp"]["held"] == two_ranks["ddp"]["whole"]
    assert two_ranks["ulysses"]["stretch"] == [0, 2]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumed_under_its_engine_ends_in_the_same_weights(name, two_ranks):
    straight, resumed = two_ranks[name], two_ranks[f"{name}-resumed"]
    assert resumed["loss"] == straight["loss"]
    assert resumed["weights"] == straight["weights"]
    assert straight["weights"]


@pytest.mark.parametrize("name", ["asked-fsdp", "asked-zero3"])
def test_a_model_in_shards_answers_questions_with_pictures_as_a_whole_one_does(name, two_ranks, folder):
    config = config_for(folder, f"alone-{name}", 1, sees=True, lora=False, engine={})
    expected = run(override(config, special(folder, ASKED)))["samples"]
    assert [sample.get("error") for step in two_ranks[name]["samples"] for sample in step] == [None] * 4
    assert two_ranks[name]["samples"] == expected
    assert expected[0] != expected[1], "a model that answers the same after a step shows nothing"


@pytest.mark.parametrize("name", ["worse-ddp", "worse-fsdp"])
def test_two_ranks_evaluate_stop_and_keep_the_best_as_one_does(name, two_ranks, folder):
    config = config_for(folder, f"alone-{name}", 1, sees=False, lora=False, engine={})
    expected, got = run(override(config, special(folder, WORSE))), two_ranks[name]
    assert got["validation"] == pytest.approx(expected["validation"], rel=5e-5)
    assert len(got["validation"]) == len(got["loss"]) == 3 < STEPS, "one evaluation after the best is worse"
    told, alone = (json.loads((folder / f"{run}/final/evaluation.json").read_text()) for run in (name, f"alone-{name}"))
    assert told["step"] == told["best_step"] == alone["best_step"] == 2
    assert got["events"] == 1, "a second rank wrote for TensorBoard too"


@pytest.mark.parametrize("name", ["broken-ddp", "broken-fsdp", "broken-zero2", "broken-zero3"])
def test_all_ranks_search_together_where_a_number_is_not_finite_and_the_first_tells(name, two_ranks, folder):
    told = two_ranks[name]["ended"]
    assert told.startswith("step 2: the gradient norm is nan" if name == "broken-ddp" else "step 2: the loss is "), told
    module, rows = re.search(
        r"; first in the .*output of (llm\S+).*; its rows: \S+text.json records ([\d, ]+);", told
    ).groups()
    assert "layers" in module
    assert rows.count(",") == 3, f"a micro-batch of two rows on either rank: {told}"
    assert json.loads((folder / f"{name}-of-another.json").read_text()) == "2", "the other leaves without a word"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("where", ["checkpoint-4", "final"])
def test_what_is_saved_are_whole_parts_that_need_no_engine(name, where, folder, two_ranks, alone):
    """A checkpoint of ZeRO-3 or FSDP2 holds the files of one process's, with the same tensors."""
    expected, saved = folder / f"alone-{RUNS[name][0]}" / where, folder / name / where
    read_manifest(saved)
    files = [path.relative_to(expected) for path in expected.rglob("*.safetensors")]
    assert files
    for file in files:
        own, other = load_file(expected / file), load_file(saved / file)
        assert own.keys() == other.keys()
        for key, tensor in own.items():
            # AdamW divides by the root of tiny squares: where a gradient is near 0 its sign decides, worth one rate
            assert torch.allclose(tensor, other[key], atol=2e-3, rtol=1e-2), (file, key)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_pth_to_hf_makes_of_shards_the_model_that_the_run_ended_with(name, folder, two_ranks, plugins):
    """The checkpoint, and DeepSpeed's folder in it, whose own shards say the same."""
    run, out = folder / name, folder / f"{name}-converted"
    config, shards = str(run / "config.json"), read_deepspeed(run / "checkpoint-4")
    assert (run / "checkpoint-4" / "global_step4").is_dir(), "DeepSpeed's shards are what this is about"
    for place in ("checkpoint-2", "checkpoint-4", "checkpoint-4/global_step4"):
        command = ["convert", "pth_to_hf", config, str(run / place), str(out), "--overwrite"]
        done = CliRunner().invoke(cli, command, standalone_mode=False)
        assert done.exception is None, done.exception
        weights = {path.relative_to(out): load_file(path) for path in out.rglob("*.safetensors")}
        final = {path: load_file(run / "final" / path) for path in weights}
        same = all(
            torch.equal(tensor, final[path][key]) for path, part in weights.items() for key, tensor in part.items()
        )
        assert same == (place != "checkpoint-2"), "two steps more must show"
    assert weights.keys() == {path.relative_to(run / "final") for path in (run / "final").rglob("*.safetensors")}
    assert {path.name for path in out.iterdir()} == {path.name for path in (run / "final").iterdir()}
    projector = weights[Path("projector.safetensors")]
    assert all(torch.equal(tensor, shards[f"projector.{key}"]) for key, tensor in projector.items())
    assert load_assistant(out, plugins, device=torch.device("cpu")).sees


def test_a_checkpoint_of_another_engine_or_number_of_processes_is_refused(folder, two_ranks):
    config = config_for(folder, "zero2", 2, sees=True, lora=True, engine=dict(ZERO2))
    reason = r"written by 2 process.* under DeepSpeed ZeRO-2, this run has 1 under DeepSpeed ZeRO-2"
    with pytest.raises(CheckpointError, match=reason):
        run(config, resume=folder / "zero2" / "checkpoint-2")


def start(config, folder, environment, *arguments):
    """`mmft train` of a config, as a process."""
    path = folder / f"{config.runtime.output_dir.name}.json"
    path.write_text(config.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "mmft", "train", str(path), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_two_nodes_train_one_model(folder, environment, alone):
    """Two torchrun groups on loopback, each started as on its own machine. Only the first rank of all speaks."""
    config = config_for(folder, "nodes", 2, sees=False, lora=False, engine={})
    where = ("--nnodes", "2", "--nproc", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    nodes = [start(config, folder, environment, *where, "--node-rank", str(rank)) for rank in range(2)]
    told = [node.communicate(timeout=600) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "step 4/4" in told[0][0]
    assert "step" not in told[1][0]
    losses = [json.loads(line)["loss"] for line in (folder / "nodes" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(alone["text"]["loss"], rel=5e-5)


def test_what_goes_wrong_on_the_first_rank_ends_all_with_one_line(folder, environment):
    (folder / "wrong.json").write_text(json.dumps([{"nothing": "here"}] * 8))
    config = config_for(folder, "bad", 2, sees=False, lora=False, engine={})
    config = override(config, {"data.datasets.0.source.path": str(folder / "wrong.json")})
    process = start(config, folder, environment, "--nproc", "2")
    out, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert err.count("mmft: error:") == 1, err
    assert "dropped 8 of 8 records" in err
    assert "step" not in out


def test_sigterm_makes_all_ranks_save_the_same_step_and_stop(folder, environment):
    config = config_for(folder, "stopped", 2, sees=False, lora=False, engine=dict(FSDP))
    config = override(config, {"optim.max_steps": 100_000, "runtime.save_steps": 100_000})
    process = start(config, folder, environment, "--nproc", "2")
    metrics = folder / "stopped" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    (checkpoint,) = (folder / "stopped").glob("checkpoint-*")
    read_manifest(checkpoint)
    assert "go on with: --resume" in (folder / "stopped" / "run.log").read_text(), err
