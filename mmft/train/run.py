"""A training run, from a config to the files it leaves: read `train()` first."""

import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, set_seed

from mmft.config import TrainConfig
from mmft.config.check import check_config
from mmft.config.load import dump_config
from mmft.data.bad_samples import drop_from, found_while_training
from mmft.data.collate import Collator
from mmft.data.dataset import prepare
from mmft.data.feed import Account, StreamFeed, read_state
from mmft.data.pack import PackedStore
from mmft.data.proof import refuse_difference
from mmft.data.sampler import StepSampler
from mmft.data.shape import Shape, describe_model
from mmft.data.store import TokenStore
from mmft.data.stream import SampleStream
from mmft.errors import CheckpointError, DataError, ModelError
from mmft.inference import Assistant
from mmft.modeling.build import TABLE_COLUMNS, build_model, module_table
from mmft.modeling.checkpoint import (
    checkpoints,
    config_digest,
    read_manifest,
    save_parts,
    write_manifest,
    written_whole,
)
from mmft.modeling.features import FeatureStore
from mmft.modeling.llava import LlavaModel
from mmft.modeling.llm import device_and_dtype
from mmft.plugins import Plugins
from mmft.train.callbacks import Interrupt, Metrics, Report, SampleChat, duration
from mmft.train.report import Facts, write_report
from mmft.train.trainer import MMTrainer, learning_rates, training_arguments

log = logging.getLogger("mmft")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def train(
    config: TrainConfig,
    plugins: Plugins,
    *,
    source: Path | None = None,
    resume: Path | bool = False,
    overwrite: bool = False,
) -> int:
    """Train, and return the exit code: 0, or 128 + the signal that ended the run early (its checkpoint is complete).

    `resume=True` goes on from the newest complete checkpoint of this config's output folder.
    """
    check_config(config, plugins)
    folder = config.runtime.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    start_log(folder / "run.log")
    checkpoint = find_checkpoint(config, resume)
    prepare_folder(config, source, going_on=checkpoint is not None, overwrite=overwrite)
    device, dtype = device_and_dtype(config.runtime)
    set_seed(config.runtime.seed)
    shape = describe_model(config.model, plugins)
    refuse_difference(plugins.chat_templates.get(config.data.chat_template), shape.tokenizer, config.data)
    cache = config.runtime.cache_dir or folder.parent / ".cache"
    store: TokenStore | StreamFeed
    if config.data.streaming:
        store = open_stream(config, plugins, shape, checkpoint)
    else:
        store = prepare(config.data, plugins, shape.tokenizer, cache, log.info, seed=config.runtime.seed)
        write_drops(folder / "dropped.jsonl", store, going_on=checkpoint is not None)
    log.info("%s", store.summary())
    built = build_model(
        config.model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=dtype, device=device,
        weights=checkpoint, gradient_checkpointing=config.runtime.gradient_checkpointing,
    )  # fmt: skip
    modules = module_table(built, learning_rates(config.optim))
    log_table(modules)
    features = cached_features(config, shape, built, store, dtype)
    facts = Facts(config, modules, store.summary(), store.drops, f"{device} {NAMES[dtype]}")
    trainer, interrupt, sampling = make_trainer(config, plugins, built, shape, store, features, facts, checkpoint)
    try:
        with interrupt.installed():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if interrupt.received is None:
            trainer.bad_samples.judge()
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("mmft.errors.DataError: ")) from error
    if interrupt.received is not None:
        write_report(facts, state=f"stopped at step {trainer.state.global_step}; go on with --resume")
        log.warning("saved %s; go on with: --resume", checkpoints(folder)[0])
        return 128 + interrupt.received
    finish(config, plugins, built, shape, facts, sampling, trainer.state.global_step, NAMES[dtype])
    return 0


def finish(
    config: TrainConfig,
    plugins: Plugins,
    built: LlavaModel,
    shape: Shape,
    facts: Facts,
    sampling: SampleChat,
    step: int,
    precision: str,
) -> None:
    """Save `final/`, ask the samples once more, and write the report."""
    folder = config.runtime.output_dir
    with written_whole(folder / "final") as temporary:
        save_parts(temporary, built, shape.tokenizer.hf)
        write_manifest(temporary, config, plugins, precision)
    sampling.ask(step)
    write_report(facts, state=f"finished at step {step}")
    log.info("finished: %s\nlook at %s\ntalk to it: mmft chat %s", folder / "final", folder / "report.html", folder)


def make_trainer(
    config: TrainConfig,
    plugins: Plugins,
    built: LlavaModel,
    shape: Shape,
    store: TokenStore | StreamFeed,
    features: FeatureStore | None,
    facts: Facts,
    checkpoint: Path | None,
) -> tuple[MMTrainer, Interrupt, SampleChat]:
    """The trainer with its data order and callbacks."""
    data, folder = config.data, config.runtime.output_dir
    device, dtype = built.device, built.dtype
    if data.packing and built.layout != "flat":
        raise ModelError("data.packing: no attention of this model keeps packed samples apart; set packing=False")
    arguments = training_arguments(config, dtype=dtype, device=device)
    dataset, sampler, feed = ordered(config, store, arguments.world_size)
    pad = shape.tokenizer.hf.pad_token_id or 0
    transform = shape.vision.transform if shape.vision else None
    trainer = MMTrainer(
        config=config,
        sampler=sampler,
        feed=feed,
        hf_tokenizer=shape.tokenizer.hf,
        write_manifest=lambda path: write_manifest(path, config, plugins, NAMES[dtype]),
        model=built,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(
            built.layout,
            pad,
            transform,
            features,
            on_bad_sample=data.on_bad_sample,
            store=store if isinstance(store, TokenStore) else None,
            seed=config.runtime.seed,
        ),
    )
    template = plugins.chat_templates.get(data.chat_template).for_tokenizer(shape.tokenizer.hf)
    sampling = SampleChat(
        Assistant(built, shape, template), config.runtime.samples, config.runtime.sample_steps, folder / "samples"
    )
    interrupt = Interrupt()
    start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    counts = lambda: (trainer.seen_tokens, trainer.trained_tokens, trainer.seen_images)  # noqa: E731
    going_on = Report(lambda: write_report(facts, state=f"running, step {trainer.state.global_step}"))
    trainer.remove_callback(PrinterCallback)
    for callback in (sampling, Metrics(folder / "metrics.jsonl", counts, start_step=start), interrupt, going_on):
        trainer.add_callback(callback)
    if "tensorboard" in config.runtime.report_to:
        trainer.add_callback(_tensorboard(folder / "tensorboard"))
    for callback in plugins.call("mmft_callbacks", config=config):
        trainer.add_callback(callback)
    return trainer, interrupt, sampling


def ordered(
    config: TrainConfig, store: TokenStore | StreamFeed, world_size: int
) -> tuple[Any, StepSampler | None, StreamFeed | None]:
    """What is trained on, and its order: a store's, packed or not, has a sampler; a stream has its own."""
    if isinstance(store, StreamFeed):
        return store.stream, None, store
    data, optim = config.data, config.optim
    dataset: Any = PackedStore.of(store, data.max_length) if data.packing else store
    if data.packing:
        log.info("%s", dataset.summary())
    step_size = optim.batch_size_per_device * optim.accumulate * world_size
    sampler = StepSampler(
        dataset.lengths, dataset.has_image, step_size,
        seed=config.runtime.seed, by_modality=data.group_by_modality, by_length=data.group_by_length,
        mixing=dataset.mixing,
    )  # fmt: skip
    return dataset, sampler, None


def open_stream(config: TrainConfig, plugins: Plugins, shape: Shape, checkpoint: Path | None) -> StreamFeed:
    """The stream of a config, from its beginning or from where a checkpoint stands."""
    position, told = read_state(checkpoint) if checkpoint else (None, {})
    stream = SampleStream(config.data, plugins, shape.tokenizer, seed=config.runtime.seed, start=position)
    drops = config.runtime.output_dir / "dropped.jsonl"
    return StreamFeed(stream, Account(drops, config.data.max_bad_fraction, log.info, **told))


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


def find_checkpoint(config: TrainConfig, resume: Path | bool) -> Path | None:
    """The checkpoint to go on from. Damaged ones are named and passed over; one of another config is refused."""
    if not resume:
        return None
    folder = config.runtime.output_dir
    candidates = checkpoints(folder) if resume is True else [Path(resume)]
    for candidate in candidates:
        try:
            manifest = read_manifest(candidate)
        except CheckpointError as error:
            if resume is not True:
                raise
            log.warning("passed over: %s", error)
            continue
        if manifest.config_digest != config_digest(config):
            raise CheckpointError(
                f"{candidate} belongs to another config (model, data or optim differ); "
                f"its own is {candidate.parent / 'config.json'}"
            )
        log.info("going on from %s", candidate)
        return candidate
    raise CheckpointError(f"nothing to resume from: {folder} has no complete checkpoint; start without --resume")


def prepare_folder(config: TrainConfig, source: Path | None, *, going_on: bool, overwrite: bool) -> None:
    """Write the config into the run's folder. An earlier run in it is never overwritten unasked."""
    folder = config.runtime.output_dir
    earlier = [*checkpoints(folder), *folder.glob("final")]
    if earlier and not going_on:
        if not overwrite:
            raise CheckpointError(
                f"{folder} holds an earlier run ({earlier[0].name}); go on with --resume, begin anew with --overwrite, "
                "or choose another --work-dir"
            )
        for path in (*earlier, folder / "samples", folder / "tensorboard"):
            shutil.rmtree(path, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    (folder / "config.json").write_text(dump_config(config), "utf-8")
    if source and source.suffix == ".py" and source.resolve() != (folder / "config.py").resolve():
        shutil.copyfile(source, folder / "config.py")


def start_log(path: Path) -> None:
    """`mmft` messages to the screen, and with their time to run.log."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    screen, file = logging.StreamHandler(sys.stdout), logging.FileHandler(path, encoding="utf-8")
    screen.setFormatter(logging.Formatter("%(message)s"))
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(screen)
    log.addHandler(file)
    log.setLevel(logging.INFO)
    log.propagate = False


def write_drops(path: Path, store: TokenStore, *, going_on: bool = False) -> None:
    """One line a record that is not trained as it was given; a resumed run keeps what was found while training."""
    lines = path.read_text("utf-8").splitlines() if going_on and path.is_file() else []
    kept = [line for line in lines if found_while_training(drop_from(line))]
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:  # a reason may quote half a character
        file.writelines(json.dumps(asdict(drop), ensure_ascii=False) + "\n" for drop in store.drops)
        file.writelines(f"{line}\n" for line in kept)


def log_table(rows: list[tuple[str, ...]]) -> None:
    """The module table, once, before the first step."""
    table = [tuple(TABLE_COLUMNS), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(TABLE_COLUMNS))]
    for row in table:
        log.info("%s", "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def cached_features(
    config: TrainConfig, shape: Shape, built: LlavaModel, store: TokenStore | StreamFeed, dtype: torch.dtype
) -> FeatureStore | None:
    """The feature store, filled for every picture of the run, where the config asks for one."""
    import time

    vision = config.model.vision
    if vision is None or vision.feature_cache is None or shape.vision is None or isinstance(store, StreamFeed):
        return None
    features = FeatureStore.for_encoder(vision, shape.vision, dtype)
    sources = sorted({source for images in store.images for source in images})
    missing = len(features.missing(sources))
    if missing:
        size = missing * features.bytes_per_image / 1e6
        log.info("feature cache: encoding %s pictures, %.1f MB, into %s", f"{missing:,}", size, features.folder)
    began = time.monotonic()
    filled = features.fill(sources, built, shape.vision.transform)
    log.info("feature cache: %s of %s pictures were new, %s", filled, len(sources), duration(time.monotonic() - began))
    return features
