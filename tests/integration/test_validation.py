"""Evaluation during training: exact, per data set, never trained on, without any effect on the training."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmft.config import LLM, Data, Dataset, Evaluation, Lora, Model, Optim, Runtime, TrainConfig, Vision, override, use
from mmft.config.check import find_problems
from mmft.data.collate import Collator
from mmft.data.dataset import prepare
from mmft.data.shape import describe_model
from mmft.data.store import TokenStore
from mmft.inference import load_assistant
from mmft.train.run import train
from mmft.train.validation import Validation, best_step, kept_checkpoints, rounds_without_best, short_names


def records(count: int, word: str) -> list[dict[str, object]]:
    turns = [[("human", f"Say {word} {i}"), ("gpt", f"{word} number {i} " + "again " * (i % 5))] for i in range(count)]
    return [{"conversations": [{"from": who, "value": text} for who, text in one]} for one in turns]


@pytest.fixture
def setting(tmp_path: Path, tiny_llm_path: Path, tiny_clip_path: Path) -> TrainConfig:
    """Two data sets, one with pictures; LoRA with dropout, so that a disturbed random state shows."""
    (tmp_path / "text.json").write_text(json.dumps(records(12, "apple")), "utf-8")
    seen = records(8, "pear")
    for i, record in enumerate(seen):
        Image.new("RGB", (30, 30), (i * 30, 90, 200)).save(tmp_path / f"{i}.png")
        record["image"] = f"{i}.png"
        record["conversations"][0]["value"] = f"<image>\nWhat is {i}?"  # type: ignore[index]
    (tmp_path / "seen.json").write_text(json.dumps(seen), "utf-8")
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(tiny_llm_path), lora=Lora(r=4, alpha=8, dropout=0.3)),
            vision=Vision(encoder=use("clip", path=str(tiny_clip_path)), projector=use("mlp2x_gelu")),
        ),
        data=Data(
            datasets=tuple(
                Dataset(source=use("json", path=str(tmp_path / name)), data_map="llava", image_folder=tmp_path)
                for name in ("text.json", "seen.json")
            ),
            chat_template="chatml",
            max_length=256,
        ),
        optim=Optim(lr=1e-2, max_steps=6, batch_size_per_device=2, accumulate=2),
        runtime=Runtime(
            output_dir=tmp_path / "run", device="cpu", precision="fp32", save_steps=100, logging_steps=1,
            evaluation=None,
        ),
    )  # fmt: skip


def with_share(config: TrainConfig, **evaluation: object) -> TrainConfig:
    changes = {"data.validation_share": 0.25, "runtime.evaluation": Evaluation(steps=2, **evaluation)}  # type: ignore[arg-type]
    return override(config, changes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {f"{path.relative_to(folder)} {name}": tensor for path in folder.rglob("*.safetensors")
             for name, tensor in load_file(path).items()}  # fmt: skip
    assert found
    return found


def ruinous(config: TrainConfig, **evaluation: object) -> TrainConfig:
    """Evaluated on what the training makes ever less likely: each evaluation is worse than the one before."""
    folder = config.runtime.output_dir.parent
    other = [{"conversations": [{"from": "human", "value": "Say"}, {"from": "gpt", "value": "ZQXJ9KV%W7" * 12}]}] * 3
    (folder / "other.json").write_text(json.dumps(other), "utf-8")
    dataset = Dataset(source=use("json", path=str(folder / "other.json")), data_map="llava")
    changes = {
        "model.llm": LLM(path=config.model.llm.path, trainable=True),
        "optim.lr": 2e-2,
        "optim.accumulate": 1,
        "data.validation": (dataset,),
        "runtime.evaluation": Evaluation(steps=2, **evaluation),  # type: ignore[arg-type]
    }
    return override(config, changes)


def lines(folder: Path, key: str) -> list[dict[str, object]]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in found if key in line]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_a_run_with_evaluation_ends_in_bitwise_the_weights_of_one_without(setting, plugins, tmp_path):
    """Same training rows (a share is held out in neither: own files), same weights, same losses."""
    own = override(setting, {"data.validation": setting.data.datasets})
    evaluated = override(own, {"runtime.evaluation": Evaluation(steps=2), "data.num_workers": 1})
    plain = override(setting, {"runtime.output_dir": tmp_path / "plain"})
    assert train(evaluated, plugins) == train(plain, plugins) == 0
    assert same(weights(tmp_path / "run" / "final"), weights(tmp_path / "plain" / "final"))
    assert [m["loss"] for m in lines(tmp_path / "run", "loss")] == [
        m["loss"] for m in lines(tmp_path / "plain", "loss")
    ]
    told = lines(tmp_path / "run", "validation_loss")
    assert [line["step"] for line in told] == [2, 4, 6]
    assert told[0]["perplexity"] == pytest.approx(math.exp(told[0]["validation_loss"]))
    assert set(told[0]["validation_loss_by_dataset"]) == {"text", "seen"}


def test_the_loss_is_the_token_mean_over_everything_whatever_the_batches(setting, plugins, tmp_path):
    """Against one forward a sample; a mean of batch means would differ, and does."""
    config = with_share(setting)
    assert train(config, plugins) == 0
    final = load_assistant(tmp_path / "run" / "final", plugins, device=torch.device("cpu"))
    store = prepared(config, plugins).validation()
    collate = Collator("flat", transform=final.shape.vision.transform)
    total, count, means = 0.0, 0, []
    for sample in store:
        batch = collate([sample])
        targets = int((batch["labels"] != -100).sum())
        with torch.no_grad():
            loss = float(final.model(**batch, num_items_in_batch=1)["loss"])
        total, count, means = total + loss, count + targets, [*means, loss / targets]
    last = lines(tmp_path / "run", "validation_loss")[-1]
    assert last["validation_loss"] == pytest.approx(total / count, abs=2e-6)
    assert abs(sum(means) / len(means) - total / count) > 1e-3
    validation = Validation(store, collate, config.runtime.evaluation, 3, 512)
    in_threes = validation.measure(final.model, torch.device("cpu"))
    halves = [validation.measure(final.model, torch.device("cpu"), rank=rank, world=2) for rank in (0, 1)]
    assert sum(one[1] for one in in_threes) / count == pytest.approx(total / count, abs=2e-6)
    for whole, *parts in zip(in_threes, *halves, strict=True):  # two ranks, each its share
        assert whole[1] == pytest.approx(sum(part[1] for part in parts), rel=1e-6)
        assert whole[2] == sum(part[2] for part in parts)


def prepared(config: TrainConfig, plugins, seed: int | None = None) -> TokenStore:
    shape = describe_model(config.model, plugins)
    cache = config.runtime.output_dir.parent / ".cache"
    seed = config.runtime.seed if seed is None else seed
    return prepare(config.data, plugins, shape.tokenizer, cache, seed=seed)


def sides(store: TokenStore) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    trained = {(one.source, one.record) for one in store}
    return trained, {(one.source, one.record) for one in store.validation()}


@pytest.mark.parametrize("mix", [{}, {"data.datasets.0.repeat": 2.0}, {"data.datasets.0.repeat": 0.5}])
def test_no_record_is_on_both_sides_and_the_choice_is_the_seeds(setting, plugins, mix):
    """Every record is split into several samples here; all of them stay on one side."""
    long = [{"conversations": [{"from": "human", "value": f"Tell {i}"}, {"from": "gpt", "value": f"go {i} " * 60}] * 2}
            for i in range(9)]  # fmt: skip
    Path(setting.data.datasets[0].source.options["path"]).write_text(json.dumps(long), "utf-8")
    config = override(with_share(setting), {"data.too_long": "split", "data.max_length": 150, **mix})
    store = prepared(config, plugins)
    trained, held = sides(store)
    assert not trained & held
    assert len(trained | held) == 9 + 8
    assert {source.rpartition("/")[2] for source, _ in held} == {"text.json", "seen.json"}  # of each data set its share
    assert len(store.validation()) > len(held), "a record has several pieces, or this shows nothing"
    assert sides(prepared(config, plugins)) == (trained, held)
    assert sides(prepared(config, plugins, seed=7))[1] != held


def test_replacements_for_broken_records_never_come_from_the_held_out_ones(setting, plugins):
    path = Path(setting.data.datasets[0].source.options["path"])
    path.write_text(json.dumps([*records(12, "apple"), *[{"conversations": []}] * 12]), "utf-8")
    config = override(with_share(setting), {"data.on_bad_sample": "replace", "data.max_bad_fraction": 1.0})
    store = prepared(config, plugins)
    trained, held = sides(store)
    assert len(store) > len(trained)  # there are replacements
    assert not trained & held


def test_the_best_checkpoint_outlives_the_limit_and_final_says_which_it_was(setting, plugins, tmp_path):
    """A rate that ruins the model after two good steps: the best is an early one."""
    changes = {"optim.max_steps": 8, "runtime.save_steps": 2, "runtime.save_total_limit": 1}
    config = override(ruinous(setting, final="best"), changes)
    assert train(config, plugins) == 0
    run = tmp_path / "run"
    measured = {line["step"]: line["validation_loss"] for line in lines(run, "validation_loss")}
    best = min(measured, key=measured.__getitem__)
    assert best != 8, f"every evaluation was meant to be worse: {measured}"
    assert sorted(path.name for path in run.glob("checkpoint-*")) == sorted({f"checkpoint-{best}", "checkpoint-8"})
    told = json.loads((run / "final" / "evaluation.json").read_text("utf-8"))
    assert (told["final"], told["step"], told["best_step"], told["last_step"]) == ("best", best, best, 8)
    assert same(weights(run / "final"), weights(run / f"checkpoint-{best}"))
    load_assistant(run / "final", plugins, device=torch.device("cpu"))  # every file matches its sha256
    assert f"validation loss was best ({measured[best]:.4f}) at step {best}" in (run / "run.log").read_text("utf-8")


def test_it_stops_when_nothing_gets_better_and_a_resumed_run_remembers(setting, plugins, tmp_path):
    changes = {"optim.max_steps": 12, "runtime.save_steps": 1}
    config = override(ruinous(setting, patience=2), changes)
    assert train(config, plugins) == 0
    run = tmp_path / "run"
    stopped = lines(run, "validation_loss")[-1]["step"]
    assert stopped < 12
    assert "stopping early" in (run / "run.log").read_text("utf-8")
    before = lines(run, "validation_loss")
    assert train(config, plugins, resume=run / f"checkpoint-{stopped - 1}") == 0
    assert lines(run, "validation_loss") == before
    assert train(config, plugins, resume=True) == 0  # from its last checkpoint: it has stopped, and stays so
    assert lines(run, "validation_loss") == before and lines(run, "loss")[-1]["step"] == stopped


def test_a_validation_picture_that_cannot_be_read_costs_its_sample_and_not_the_run(setting, plugins, tmp_path):
    bad = [{"image": "broken.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                     {"from": "gpt", "value": "bad"}]}]  # fmt: skip
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "bad.json").write_text(json.dumps(records(3, "plum") + bad), "utf-8")
    own = setting.data.datasets[0].model_copy(update={"source": use("json", path=str(tmp_path / "bad.json"))})
    config = override(setting, {"data.validation": (own,), "runtime.evaluation": Evaluation(steps=3)})
    assert train(config, plugins) == 0
    assert "broken.png" in (tmp_path / "run" / "run.log").read_text("utf-8")
    assert len(lines(tmp_path / "run", "validation_loss")) == 2


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"runtime.evaluation": Evaluation()}, "runtime.evaluation"),
        ({"data.validation_share": 0.1}, "data.validation_share"),
        ({"data.validation_share": 0.1, "runtime.evaluation": Evaluation(final="best", keep_best=False)},
         "runtime.evaluation.final"),
        ({"data.validation_share": 0.1, "data.streaming": True, "runtime.evaluation": Evaluation()},
         "data.validation_share"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_found_before_a_weight_is_read(setting, plugins, changes, where):
    assert where in [problem.where for problem in find_problems(override(setting, changes), plugins)]


def test_repeats_and_both_kinds_of_validation_are_refused(setting, plugins):
    repeated = setting.data.datasets[0].model_copy(update={"repeat": 2.0})
    both = {"data.validation": (repeated,), "data.validation_share": 0.1, "runtime.evaluation": Evaluation()}
    found = [problem.where for problem in find_problems(override(setting, both), plugins)]
    assert found == ["data.validation_share", "data.validation.0.repeat"]


def test_best_and_patience_are_read_from_the_log_history():
    history = [{"step": s, "eval_loss": loss} for s, loss in ((2, 3.0), (4, 1.0), (6, float("nan")), (8, 1.0))]
    assert best_step(history) == 4
    assert rounds_without_best(history) == 2
    assert best_step([{"step": 1, "loss": 0.1}]) is None
    found = [Path(f"checkpoint-{n}") for n in (8, 6, 4, 2)]
    assert kept_checkpoints(found, 1, Evaluation(), history) == {found[0], found[2]}
    assert kept_checkpoints(found, 1, Evaluation(keep_best=False), history) == {found[0]}
    assert short_names(["a/x.json", "b/x.json", "y.json", "y.json"]) == (
        "a/x.json",
        "b/x.json",
        "y.json (2)",
        "y.json (3)",
    )
