"""`mmft plan`: steps, what fits, what to change, and two real steps beside the estimate."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from mmft.cli import cli
from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.config.load import dump_config, override
from mmft.data.dataset import prepare
from mmft.data.shape import describe_model
from mmft.errors import ConfigError, MmftError
from mmft.plan.advice import TRIES, largest_batch
from mmft.plan.memory import Planner
from mmft.plan.report import lines_of, make_report, parse_size, safe
from mmft.plan.steps import SAMPLE, read_data
from mmft.plugins import Plugins

NUMBER = 30


@pytest.fixture
def config(tiny_llm_path: Path, tiny_clip_path: Path, tmp_path: Path) -> TrainConfig:
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.png")
    records = []
    for i in range(NUMBER):
        mark = {"image": "a.png"} if i % 3 == 0 else {}
        question = ("<image>\n" if mark else "") + "what " * (1 + i % 5)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes " * (2 + i)}]
        records.append({"conversations": turns, **mark})
    (tmp_path / "data.json").write_text(json.dumps(records))
    source = use("json", path=tmp_path / "data.json")
    encoder = use("clip", path=str(tiny_clip_path))
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(tiny_llm_path), lora=Lora(r=16)),
            vision=Vision(encoder=encoder, projector=use("mlp2x_gelu")),
        ),
        data=Data(
            datasets=(Dataset(source=source, data_map="llava", image_folder=tmp_path),),
            chat_template="chatml",
            max_length=512,
        ),
        optim=Optim(lr=1e-3, batch_size_per_device=4, accumulate=2),
        runtime=Runtime(output_dir=tmp_path / "run", device="cpu", precision="fp32"),
    )


def test_steps_are_those_of_the_trainer(config: TrainConfig, plugins: Plugins) -> None:
    plan = read_data(config, plugins, describe_model(config.model, plugins))
    assert plan.steps_per_epoch() == 4  # 30 records in batches of 4 are 8, two of which are a step
    assert plan.steps_per_epoch(world=2) == 2
    assert read_data(override(config, {"optim.max_steps": 7}), plugins, plan_shape(config, plugins)).steps() == 7


def plan_shape(config: TrainConfig, plugins: Plugins):  # type: ignore[no-untyped-def]
    return describe_model(config.model, plugins)


def test_an_existing_token_store_is_used_and_none_is_written(config: TrainConfig, plugins: Plugins) -> None:
    shape, cache = describe_model(config.model, plugins), config.runtime.output_dir.parent / ".cache"
    before = read_data(config, plugins, shape)
    assert before.source == f"all {NUMBER} records, read now"
    assert not list(cache.glob("tokens-*"))
    store = prepare(config.data, plugins, shape.tokenizer, cache)
    after = read_data(config, plugins, shape)
    assert after.source.startswith("token store")
    assert after.tokens_per_epoch == before.tokens_per_epoch == int(store.lengths.sum())


def test_many_records_are_estimated_from_the_first_ones_and_it_says_so(
    config: TrainConfig, plugins: Plugins, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}] * (3 * SAMPLE)))
    plan = read_data(config, plugins, describe_model(config.model, plugins))
    assert plan.source == f"the first {SAMPLE:,} of {3 * SAMPLE:,} records"
    assert plan.steps_per_epoch() == 3 * SAMPLE // 8


def test_the_largest_batch_is_found_with_its_pictures_and_targets(config: TrainConfig, plugins: Plugins) -> None:
    shape = describe_model(config.model, plugins)
    plan = read_data(override(config, {"data.packing": True}), plugins, shape, whole=True)
    batch = plan.batches(1)[0]
    items = plan.largest(1)[0]
    samples = plan.dataset[int(items[0])].samples  # type: ignore[union-attr]
    assert batch.lengths == tuple(map(len, samples))
    assert batch.num_labels == sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    assert batch.num_images == sum(len(sample.images) for sample in samples) > 0
    assert batch.num_tokens == max(plan.dataset.lengths)


def test_the_batch_that_is_said_to_fit_fits_and_the_next_one_does_not(config: TrainConfig, plugins: Plugins) -> None:
    shape = describe_model(config.model, plugins)
    planner, plan = Planner(plugins, shape, "cuda"), read_data(config, plugins, shape)
    limit = planner.estimate(config, plan.batches(5)).total
    found = largest_batch(planner, plan, limit)
    assert planner.estimate(config, plan.batches(found)).total <= limit
    assert found >= 4
    assert largest_batch(planner, plan, planner.estimate(config, plan.batches(1)).total - 1) == 0


def test_few_simulations_find_the_largest_batch_and_each_is_told(config: TrainConfig, plugins: Plugins) -> None:
    shape, told = describe_model(config.model, plugins), list[str]()
    planner, plan = Planner(plugins, shape, "cuda"), read_data(config, plugins, shape)
    limit = planner.estimate(config, plan.batches(20)).total
    found = largest_batch(planner, plan, limit, told.append)
    assert found >= 18 and planner.estimate(config, plan.batches(found)).total <= limit
    assert 2 < len(told) <= 1 + TRIES
    assert told[:2] == [f"looking for the largest batch that fits: simulating one of {size}" for size in (1, 2)]


def test_where_the_data_ends_before_the_memory_it_says_so(
    config: TrainConfig, plugins: Plugins, tmp_path: Path
) -> None:
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns}]))
    told: list[str] = []
    text = "\n".join(lines_of(make_report(config, plugins, gpu="8GB", say=told.append)))
    assert "largest optim.batch_size_per_device that fits: 1 (the data has only 1 row)" in text
    assert told[0] == "reading the model's configuration and the data"


def test_changes_save_what_they_say(config: TrainConfig, plugins: Plugins) -> None:
    report = make_report(config, plugins, gpu="512MB")
    assert not report.fits
    by_command = {str(change): change for change in report.changes}
    assert {"--set runtime.gradient_checkpointing=true", "--set model.llm.quantization=nf4"} <= set(by_command)
    checkpointing = by_command["--set runtime.gradient_checkpointing=true"]
    changed = override(config, {"runtime.gradient_checkpointing": True})
    again = make_report(changed, plugins, gpu="512MB", advise=False)
    assert checkpointing.saved == report.memory.total - again.memory.total
    text = "\n".join(lines_of(report))
    assert "does not fit a card (512.0 MiB): " in text
    assert "time: not known without running it; --probe runs two steps" in text


def test_changes_that_fit_only_together_are_named_together(config: TrainConfig, plugins: Plugins) -> None:
    alone = make_report(config, plugins, gpu="512MB")
    assert alone.together is None  # the runtime alone is more than that
    best = alone.changes[0].total
    report = make_report(config, plugins, gpu=f"{1.1 * (best - 1) / 2**20}MB")
    assert report.together and report.together.total <= safe(report.limit)
    assert len(report.together.settings) > 1


def test_a_config_that_cannot_train_is_refused_before_anything_is_read(config: TrainConfig, plugins: Plugins) -> None:
    with pytest.raises(ConfigError, match="no chat template named"):
        make_report(override(config, {"data.chat_template": "vicunna"}), plugins)


def test_what_fits_without_the_margin_fits_only_closely(config: TrainConfig, plugins: Plugins) -> None:
    total = make_report(config, plugins, gpu="8GB", advise=False).memory.total
    found = {}
    for factor in (0.99, 1.05, 1.11):
        report = make_report(config, plugins, gpu=f"{factor * total / 2**20}MB", advise=False)
        found[report.verdict] = report.fits
        assert any(line.startswith(report.verdict) for line in lines_of(report))
    assert found == {"does not fit": False, "fits closely": False, "fits": True}


def test_a_plan_for_a_card_is_not_held_against_what_a_cpu_took(config: TrainConfig, plugins: Plugins) -> None:
    """The card's dropout masks are smaller, and `auto` means bf16 there."""
    report = make_report(config, plugins, gpu="8GB", with_probe=True, advise=False)
    here = make_report(config, plugins, advise=False)
    assert report.measured and report.measured.device == here.target == "cpu"
    assert report.compared == here.memory.without_runtime != report.memory.without_runtime


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 2**30), ("24g", 24 * 2**30), ("512MB", 2**29), ("1.5GiB", 3 * 2**29)]
)
def test_sizes_of_cards(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "eight", "-8GB", "0GB", "8XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(MmftError, match="write 8GB"):
        parse_size(text)


def test_two_real_steps_are_measured_beside_the_estimate(config: TrainConfig, tmp_path: Path) -> None:
    """The command as a user gives it: the measured peak, the error, and only then a time."""
    path = tmp_path / "plan.json"
    path.write_text(dump_config(config))
    done = CliRunner().invoke(cli, ["plan", str(path), "--probe", "--json"], catch_exceptions=False)
    told = json.loads(done.output[done.output.index("{") :])
    assert told["fits"] is True
    assert told["measured"]["peak"] > 0
    assert told["measured"]["tokens"] == sum(told["largest"][0]["lengths"])
    expected = told["compared"] / told["measured"]["peak"] - 1
    assert told["verdict"] == "fits"
    assert told["error"] == pytest.approx(expected)
    a_step = told["measured"]["seconds"] / (told["measured"]["tokens"] * 2)
    assert told["seconds_per_epoch"] == pytest.approx(a_step * told["tokens_per_epoch"])
