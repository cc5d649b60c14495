"""Everything that can be known to be wrong with a config without reading a weight, all at once."""

import importlib.util
import inspect
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from mmft.config.check_engine import engine_problems
from mmft.config.check_evaluation import evaluation_problems
from mmft.config.check_methods import method_problems
from mmft.config.check_streaming import streaming_problems
from mmft.config.picture import describe_encoder, num_tokens
from mmft.config.schema import LLM, Dataset, TrainConfig, Use, Vision
from mmft.errors import ConfigError, MmftError, Problem, did_you_mean
from mmft.foreign_paths import windows_hint
from mmft.plugins import Catalog, Plugins

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_config(config: TrainConfig, plugins: Plugins) -> None:
    """Raise `ConfigError` with every problem found; silent when there is none."""
    problems = list(find_problems(config, plugins))
    if problems:
        raise ConfigError(problems)


def find_problems(config: TrainConfig, plugins: Plugins) -> Iterator[Problem]:
    """The problems of a config, in the order of its parts."""
    yield from _llm_problems(config.model.llm)
    if config.model.vision:
        yield from _vision_problems(config, config.model.vision, plugins)
    yield from _data_problems(config, plugins)
    yield from evaluation_problems(config)
    yield from _training_problems(config)
    yield from method_problems(config)
    yield from _runtime_problems(config)
    yield from engine_problems(config, plugins)
    yield from plugins.call("mmft_check_config", config=config, plugins=plugins)


def check_data(config: TrainConfig, plugins: Plugins) -> None:
    """As `check_config`, but only the data and what it needs of the model: the tokenizer and the size of a picture.

    For the commands that look at data, which a run may not be ready for yet.
    """
    problems = list(model_path_problems("model.llm.path", config.model.llm.path))
    if config.model.vision:
        problems += _picture_problems(config, config.model.vision, plugins)
    problems += (found for found in _data_problems(config, plugins) if found.where.startswith("data"))
    if problems:
        raise ConfigError(problems)


def _data_problems(config: TrainConfig, plugins: Plugins) -> Iterator[Problem]:
    yield from _name_problems("data.chat_template", plugins.chat_templates, config.data.chat_template)
    for index, dataset in enumerate(config.data.datasets):
        yield from _dataset_problems(f"data.datasets.{index}", dataset, plugins)
    for index, dataset in enumerate(config.data.validation):
        yield from _dataset_problems(f"data.validation.{index}", dataset, plugins)
    yield from _mixing_problems(config)
    yield from streaming_problems(config)


def _llm_problems(llm: LLM) -> Iterator[Problem]:
    yield from model_path_problems("model.llm.path", llm.path)
    if llm.quantization != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            yield Problem(
                "model.llm.quantization", f"{llm.quantization} needs bitsandbytes", "pip install bitsandbytes"
            )
        if llm.trainable:
            yield Problem(
                "model.llm.trainable",
                f"a model in {llm.quantization} cannot be trained whole",
                "set model.llm.lora, or quantization='none'",
            )
    if llm.trainable and llm.lora:
        yield Problem("model.llm.trainable", "the whole model and a LoRA adapter cannot both train", "drop one of them")
    yield from _adapter_problems("model.llm", llm)
    if llm.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        yield Problem("model.llm.attention", "flash_attention_2 needs flash-attn", "pip install flash-attn")


def _adapter_problems(where: str, part: LLM | Vision) -> Iterator[Problem]:
    if part.adapter and not part.lora:
        yield Problem(f"{where}.adapter", f"an adapter to start from needs {where}.lora", "give its r and alpha")
    if part.adapter and not (part.adapter / "adapter_config.json").is_file():
        yield Problem(f"{where}.adapter", f"{part.adapter} has no adapter_config.json", "give a PEFT adapter folder")


def model_path_problems(where: str, path: str) -> Iterator[Problem]:
    """A local model folder must hold a config.json; anything shaped like a hub id is left to the hub."""
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            yield Problem(where, f"{path} has no config.json", "give a folder saved by save_pretrained, or a hub id")
    elif not HUB_ID.fullmatch(path) or path.startswith("."):
        hint = windows_hint(path) or "give a folder saved by save_pretrained, or a hub id"
        yield Problem(where, f"{path} does not exist", hint)


def _picture_problems(config: TrainConfig, vision: Vision, plugins: Plugins) -> Iterator[Problem]:
    """What decides how many tokens a picture has."""
    encoder = yield from _use_problems(
        "model.vision.encoder", plugins.vision_encoders, vision.encoder, lambda spec: spec.build, ()
    )
    projector = yield from _use_problems(
        "model.vision.projector", plugins.projectors, vision.projector, lambda spec: spec.build, (1, 1)
    )
    if encoder:
        yield from _describe_problems(config, vision, projector, plugins)


def _vision_problems(config: TrainConfig, vision: Vision, plugins: Plugins) -> Iterator[Problem]:
    yield from _picture_problems(config, vision, plugins)
    if vision.projector_weights and not vision.projector_weights.exists():
        yield Problem(
            "model.vision.projector_weights",
            f"{vision.projector_weights} does not exist",
            "run the pretrain stage first, or point to another projector.safetensors",
        )
    if vision.trainable and vision.lora:
        yield Problem("model.vision.trainable", "the whole encoder and a LoRA adapter cannot both train", "drop one")
    yield from _adapter_problems("model.vision", vision)
    if vision.feature_cache and (vision.trainable or vision.lora):
        yield Problem("model.vision.feature_cache", "features of an encoder that trains cannot be cached", "drop one")


def _describe_problems(config: TrainConfig, vision: Vision, projector: Any, plugins: Plugins) -> Iterator[Problem]:
    """What the encoder's own configuration says: a path that is not there, a size that does not fit."""
    options, option = dict(vision.encoder.options), plugins.vision_encoders.get(vision.encoder.name).hub_option
    if name := str(options.get(option, "")) if option else "":
        found = list(model_path_problems(f"model.vision.encoder.{option}", name))
        yield from found
        local = Path(name).expanduser()
        if found or not local.is_dir():  # the hub would have to be asked
            return
        options[str(option)] = str(local)
    try:
        info = describe_encoder(vision, plugins, options)
        tokens = num_tokens(vision, plugins, info) if projector else info.num_patches
    except (MmftError, ValueError) as error:
        yield Problem("model.vision", str(error))
        return
    if tokens >= config.data.max_length:
        yield Problem(
            "data.max_length",
            f"{config.data.max_length} tokens leave no room beside an image of {tokens} tokens",
            "raise it, or use a projector that gives fewer tokens",
        )


def _dataset_problems(where: str, dataset: Dataset, plugins: Plugins) -> Iterator[Problem]:
    source = yield from _use_problems(f"{where}.source", plugins.datasets, dataset.source, lambda spec: spec.load, ())
    if source and source.files:
        try:
            missing = [path for path in source.files(**dataset.source.options) if not Path(path).exists()]
        except (MmftError, TypeError, ValueError) as error:
            yield Problem(f"{where}.source", str(error))
        else:
            for path in missing:
                yield Problem(f"{where}.source", f"{path} does not exist", windows_hint(str(path)))
    yield from _name_problems(f"{where}.data_map", plugins.data_maps, dataset.data_map)
    if dataset.image_folder and not dataset.image_folder.is_dir():
        hint = windows_hint(str(dataset.image_folder))
        yield Problem(f"{where}.image_folder", f"{dataset.image_folder} is not a folder", hint)
    if dataset.system_text is not None:
        yield from _name_problems(f"{where}.system_text", plugins.system_texts, dataset.system_text)
        if dataset.system is not None:
            yield Problem(f"{where}.system_text", "the system text is given by name and in full", "drop one of them")


def _mixing_problems(config: TrainConfig) -> Iterator[Problem]:
    """Weights are relative to each other, so all datasets have one or none; beside a weight, repeat says nothing."""
    datasets = config.data.datasets
    without = [index for index, dataset in enumerate(datasets) if dataset.weight is None]
    if 0 < len(without) < len(datasets):
        listed = ", ".join(f"data.datasets.{index}" for index in without)
        yield Problem("data.datasets", f"{listed} has no weight, others have one", "give all of them a weight, or none")
    for index, dataset in enumerate(datasets):
        if dataset.weight is not None and dataset.repeat != 1 and not config.data.streaming:
            yield Problem(
                f"data.datasets.{index}.repeat", f"{dataset.repeat:g} times and a weight exclude each other", "drop one"
            )


def _training_problems(config: TrainConfig) -> Iterator[Problem]:
    llm, vision = config.model.llm, config.model.vision
    vision_trains = vision is not None and (vision.projector_trainable or vision.trainable or bool(vision.lora))
    if not (llm.trainable or llm.lora or vision_trains):
        yield Problem("model", "nothing is trained", "set model.llm.lora, model.llm.trainable or model.vision")
    if config.optim.optimizer != type(config.optim).model_fields["optimizer"].default:
        yield from _optimizer_problems(config.optim.optimizer)
    if config.optim.projector_lr and not (vision and vision.projector_trainable):
        yield Problem("optim.projector_lr", "there is no projector that trains", "drop it")
    if config.optim.vision_lr and not (vision and (vision.trainable or vision.lora)):
        yield Problem("optim.vision_lr", "the vision encoder does not train", "set model.vision.lora or drop it")
    if config.data.packing and (config.data.group_by_modality or config.data.group_by_length):
        yield Problem("data.packing", "packed rows are full already", "drop group_by_modality and group_by_length")


def _optimizer_problems(name: str) -> Iterator[Problem]:
    from transformers.training_args import OptimizerNames

    known = [member.value for member in OptimizerNames]
    if name not in known:
        hint = did_you_mean(name, known)
        usual = "adamw_torch, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit, lion_8bit, adafactor"
        yield Problem("optim.optimizer", f"no optimizer named {name!r}{hint}", f"usual ones: {usual}")


def _runtime_problems(config: TrainConfig) -> Iterator[Problem]:
    runtime = config.runtime
    for index, prompt in enumerate(runtime.samples):
        where = f"runtime.samples.{index}.images"
        if prompt.images and not config.model.vision:
            yield Problem(where, "the model has no vision encoder", "set model.vision or drop the images")
        yield from (Problem(where, f"{image} does not exist") for image in prompt.images if not image.is_file())
    if runtime.sample_steps and not runtime.samples:
        yield Problem("runtime.sample_steps", "there is nothing to ask", "give runtime.samples")
    for package in runtime.report_to:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of this name, which W&B itself makes, is no package
            yield Problem("runtime.report_to", f"{package} is not installed", f"pip install {package}")


def _name_problems(where: str, catalog: Catalog[Any], name: str) -> Iterator[Problem]:
    try:
        catalog.get(name)
    except MmftError as error:
        yield Problem(where, str(error))


def _use_problems(
    where: str,
    catalog: Catalog[Any],
    chosen: Use,
    function: Callable[[Any], Callable[..., Any]],
    positional: Iterable[Any],
) -> Generator[Problem, None, Any]:
    """Problems of a `use(...)`: an unknown name, or options its function does not take. Returns the spec, or None."""
    try:
        spec = catalog.get(chosen.name)
    except MmftError as error:
        yield Problem(where, str(error))
        return None
    try:
        inspect.signature(function(spec)).bind(*positional, **chosen.options)
    except TypeError as error:
        parameters = list(inspect.signature(function(spec)).parameters)[len(tuple(positional)) :]
        yield Problem(where, f"{catalog.kind} {chosen.name!r}: {error}", f"options: {', '.join(parameters) or 'none'}")
        return None
    return spec
