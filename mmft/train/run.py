"""A training run, from a config to the files it leaves: read `train()` first."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments, set_seed

from mmft.config import TrainConfig
from mmft.config.check import check_config
from mmft.data.collate import Collator
from mmft.data.dataset import prepare
from mmft.data.feed import Account, StreamFeed, read_state
from mmft.data.files import source_name
from mmft.data.pack import PackedStore
from mmft.data.proof import refuse_difference
from mmft.data.records import bound_template
from mmft.data.sampler import StepSampler, describe_steps, make_sampler
from mmft.data.shape import Shape, describe_model
from mmft.data.store import TokenStore
from mmft.data.stream import SampleStream
from mmft.errors import CheckpointError, DataError, ModelError
from mmft.inference import Assistant
from mmft.modeling.build import build_model, module_table
from mmft.modeling.checkpoint import checkpoints, gather_parts, save_parts, write_manifest, written_whole
from mmft.modeling.features import FeatureStore
from mmft.modeling.llava import LlavaModel
from mmft.modeling.llm import device_and_dtype
from mmft.plugins import Plugins
from mmft.ranks import Ranks, started
from mmft.train.callbacks import Interrupt, Metrics, Report, SampleChat
from mmft.train.engine import Engine, choose_engine
from mmft.train.folder import find_checkpoint, follow_log, log_table, prepare_folder, start_log, write_drops
from mmft.train.progress import duration
from mmft.train.report import Facts, write_report
from mmft.train.trackers import Reporting, trackers
from mmft.train.trainer import MMTrainer, learning_rates, training_arguments
from mmft.train.validation import WhenToEvaluate, open_validation, prepare_validation, settle_final

log = logging.getLogger("mmft")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def train(
    config: TrainConfig,
    plugins: Plugins,
    *,
    source: Path | None = None,
    resume: Path | bool = False,
    overwrite: bool = False,
    other_versions: bool = False,
) -> int:
    """Train, and return the exit code: 0, or 128 + the signal that ended the run early (its checkpoint is complete).

    `resume=True` goes on from the newest complete checkpoint of this config's output folder, with `other_versions` also
    where other plugins wrote it.
    """
    with started(config.runtime) as ranks:
        ranks.first_does(lambda: check_config(config, plugins))
        engine = choose_engine(config, plugins, ranks)
        checkpoint = ranks.first_does(lambda: begin(config, plugins, engine, source, resume, overwrite, other_versions))
        return _train(config, plugins, ranks, engine, checkpoint)


def _train(config: TrainConfig, plugins: Plugins, ranks: Ranks, engine: Engine, checkpoint: Path | None) -> int:
    """One process of a run. Only the first one writes and speaks; what it does alone, the others wait for."""
    folder = config.runtime.output_dir
    if not ranks.first:
        follow_log(ranks.rank)
    device, dtype = device_and_dtype(config.runtime)
    set_seed(config.runtime.seed)
    shape = describe_model(config.model, plugins)
    template = bound_template(config.data.chat_template, plugins, shape.tokenizer)
    ranks.first_does(lambda: refuse_difference(template, shape.tokenizer, config.data))
    cache = config.runtime.cache_dir or folder.parent / ".cache"
    store: TokenStore | StreamFeed
    if config.data.streaming:
        store = open_stream(config, plugins, shape, checkpoint)
    else:
        store = tokens = ranks.one_by_one(
            lambda: prepare(config.data, plugins, shape.tokenizer, cache, log.info, seed=config.runtime.seed)
        )
        ranks.first_does(lambda: write_drops(folder / "dropped.jsonl", tokens, going_on=checkpoint is not None))
    log.info("%s", store.summary())
    validation = ranks.one_by_one(lambda: prepare_validation(config, plugins, shape.tokenizer, cache, store))
    built = build_model(
        config.model, plugins, info=shape.vision, image_id=shape.tokenizer.image_id, dtype=dtype, weights=checkpoint,
        device=engine.build_device(device), gradient_checkpointing=config.runtime.gradient_checkpointing,
    )  # fmt: skip
    modules = module_table(built, learning_rates(config.optim))
    log_table(modules)
    features = ranks.one_by_one(lambda: cached_features(config, shape, built, store, dtype))
    arguments = training_arguments(config, dtype=dtype, device=device, **engine.arguments(built))
    built.lockstep = engine.sharded and features is None
    engine.share_rows(built)
    engine.prepare(built, device)
    facts = Facts(config, modules, store.summary(), store.drops, f"{device} {NAMES[dtype]}{engine.described()}")
    trainer, interrupt, sampling, reporting = make_trainer(
        config, plugins, built, shape, store, features, facts, checkpoint, engine, arguments, validation
    )
    try:
        with interrupt.installed(), trainer.screen.shown(), reporting.closed():
            if not trainer.stands_at_the_end_of(checkpoint):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if interrupt.received is None:
            trainer.bad_samples.judge()
    except DataError as error:
        raise DataError(str(error).strip().splitlines()[-1].removeprefix("mmft.errors.DataError: ")) from error
    if interrupt.received is not None:
        if ranks.first:
            write_report(facts, state=f"stopped at step {trainer.state.global_step}; go on with --resume")
            log.warning("saved %s; go on with: --resume", checkpoints(folder)[0])
        return 128 + interrupt.received
    sampling.ask(trainer.state.global_step)
    gathered = gather_parts(built, engine.full, keep=ranks.first)
    state = trainer.state
    ranks.first_does(lambda: finish(config, plugins, built, shape, facts, state, NAMES[dtype], gathered))
    return 0


def begin(
    config: TrainConfig,
    plugins: Plugins,
    engine: Engine,
    source: Path | None,
    resume: Path | bool,
    overwrite: bool,
    other_versions: bool,
) -> Path | None:
    """The run's folder, its log and its config; returns the checkpoint to go on from."""
    folder = config.runtime.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start_log(folder / "run.log")
    except OSError as error:
        raise CheckpointError(f"runtime.output_dir: {folder} cannot be written to: {error.strerror}") from error
    checkpoint = find_checkpoint(config, plugins, resume, other_versions=other_versions)
    if checkpoint:
        engine.refuse_other(checkpoint)
        log.info("going on from %s", checkpoint)
    prepare_folder(config, source, going_on=checkpoint is not None, overwrite=overwrite)
    return checkpoint


def finish(
    config: TrainConfig,
    plugins: Plugins,
    built: LlavaModel,
    shape: Shape,
    facts: Facts,
    state: Any,
    precision: str,
    gathered: dict[str, dict[str, torch.Tensor]],
) -> None:
    """Save `final/` and write the report."""
    folder = config.runtime.output_dir
    with written_whole(folder / "final") as temporary:
        save_parts(temporary, built, shape.tokenizer.hf, gathered)
        told = settle_final(temporary, folder, state, config.runtime.evaluation)
        write_manifest(temporary, config, plugins, precision)
    write_report(facts, state=told)
    log.info("%s: %s\nlook at %s\ntalk to it: mmft chat %s", told, folder / "final", folder / "report.html", folder)


def make_trainer(
    config: TrainConfig,
    plugins: Plugins,
    built: LlavaModel,
    shape: Shape,
    store: TokenStore | StreamFeed,
    features: FeatureStore | None,
    facts: Facts,
    checkpoint: Path | None,
    engine: Engine,
    arguments: TrainingArguments,
    validation: TokenStore | None,
) -> tuple[MMTrainer, Interrupt, SampleChat, Reporting]:
    """The trainer with its data order and callbacks."""
    data, folder = config.data, config.runtime.output_dir
    dtype = built.dtype
    if data.packing and built.layout != "flat":
        raise ModelError("data.packing: no attention of this model keeps packed samples apart; set packing=False")
    dataset, sampler, feed = ordered(config, store, arguments.world_size // engine.sequence)
    if sampler:
        rows = describe_steps(sampler, config.optim.batch_size_per_device, padded=built.layout == "padded")
        log.info("%s", rows)
    collate = collator(config, built, shape, store, features)
    trainer = MMTrainer(
        config=config,
        sampler=sampler,
        feed=feed,
        engine=engine,
        hf_tokenizer=shape.tokenizer.hf,
        write_manifest=lambda path: write_manifest(path, config, plugins, NAMES[dtype]),
        model=built,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        validation=open_validation(config, validation, collate),
    )
    if checkpoint and not feed:
        trainer.bad_samples.load(checkpoint)
    template = bound_template(data.chat_template, plugins, shape.tokenizer)
    sampling = SampleChat(
        Assistant(built, shape, template), config.runtime.samples, config.runtime.sample_steps, folder / "samples",
        trainer.pace, together=engine.sharded, tells=engine.ranks.first,
    )  # fmt: skip
    interrupt = Interrupt(engine.ranks.any)
    start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    metrics = Metrics(folder / "metrics.jsonl", trainer.screen, trainer.pace, start_step=start)
    going_on = Report(lambda: write_report(facts, state=f"running, step {trainer.state.global_step}"))
    trainer.remove_callback(PrinterCallback)
    when = [WhenToEvaluate(config.runtime.evaluation.steps)] if config.runtime.evaluation else []
    told = trackers(config.runtime.report_to) if engine.ranks.first else {}  # else each rank begins runs of its own
    reporting = Reporting(told, config, start_step=start)
    for callback in (*when, interrupt, sampling, reporting, metrics, trainer.screen, going_on):
        trainer.add_callback(callback)
    for callback in plugins.call("mmft_callbacks", config=config):
        trainer.add_callback(callback)
    return trainer, interrupt, sampling, reporting


def collator(
    config: TrainConfig, built: LlavaModel, shape: Shape, store: TokenStore | StreamFeed, features: FeatureStore | None
) -> Collator:
    """The collate function of a run; with several datasets the model is told to add up the loss of each."""
    sources = tuple(dict.fromkeys(map(source_name, config.data.datasets)))
    built.num_datasets = len(sources)
    return Collator(
        built.layout,
        shape.tokenizer.hf.pad_token_id or 0,
        shape.vision.transform if shape.vision else None,
        features,
        on_bad_sample=config.data.on_bad_sample,
        store=store if isinstance(store, TokenStore) else None,
        seed=config.runtime.seed,
        tells_origins=True,
        datasets=sources if len(sources) > 1 else (),
    )


def ordered(
    config: TrainConfig, store: TokenStore | StreamFeed, world_size: int
) -> tuple[Any, StepSampler | None, StreamFeed | None]:
    """What is trained on, and its order: a store's, packed or not, has a sampler; a stream has its own."""
    if isinstance(store, StreamFeed):
        return store.stream, None, store
    data = config.data
    dataset: Any = PackedStore.of(store, data.max_length) if data.packing else store
    if data.packing:
        log.info("%s", dataset.summary())
    return dataset, make_sampler(config, dataset, world_size), None


def open_stream(config: TrainConfig, plugins: Plugins, shape: Shape, checkpoint: Path | None) -> StreamFeed:
    """The stream of a config, from its beginning or from where a checkpoint stands."""
    position, told = read_state(checkpoint) if checkpoint else (None, {})
    stream = SampleStream(config.data, plugins, shape.tokenizer, seed=config.runtime.seed, start=position)
    drops = config.runtime.output_dir / "dropped.jsonl"
    return StreamFeed(stream, Account(drops, config.data.max_bad_fraction, log.info, **told))


def cached_features(
    config: TrainConfig, shape: Shape, built: LlavaModel, store: TokenStore | StreamFeed, dtype: torch.dtype
) -> FeatureStore | None:
    """The feature store, filled for every picture of the run, where the config asks for one."""
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
    refuse = config.data.on_bad_sample == "error"
    filled = features.fill(sources, built, shape.vision.transform, refuse=refuse)
    log.info("feature cache: %s of %s pictures were new, %s", filled, len(sources), duration(time.monotonic() - began))
    if features.unreadable:
        log.warning(
            "feature cache: %d pictures cannot be read; their samples are told as bad", len(features.unreadable)
        )
    return features
