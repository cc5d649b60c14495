"""What encoders, projectors, data sources and folders of configs must keep.

Their functions take options. Where one of those has no default, nothing is run before it is given.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mmft.errors import PluginError
from mmft.specs import ConfigDir, DatasetSpec, ProjectorSpec, VisionEncoderSpec, VisionInfo
from mmft.testing.blame import blamed, must_pickle
from mmft.types import BadRecord

PATCHES = (16, 64, 256, 576, 1024)  # what a projector is tried on: the first of these that fit its options
WIDTHS = (64, 128)  # of encoder and language model: numbers that have any usual number of heads
RECORDS = 100  # of a source that are looked at


def needed(function: Callable[..., Any], given: int = 0) -> list[str]:
    """The options without a default, behind the first `given` arguments, which mmft gives itself."""
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)
    parameters = [one for one in inspect.signature(function).parameters.values() if one.kind in plain]
    return [one.name for one in parameters[given:] if one.default is inspect.Parameter.empty]


def _takes(function: Callable[..., Any], option: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(one.name == option or one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)


def check_vision_encoder(spec: VisionEncoderSpec, **options: Any) -> None:
    """The module gives the shape that `describe` says, of finite numbers, and the same when it is built again.

    A frozen encoder is not saved, so weights that come out otherwise would be another encoder than the trained one.
    `describe` and `build` take the same options. Raises `PluginError`.
    """
    where = f"vision encoder {spec.name!r}"
    names = [_options_of(function) for function in (spec.describe, spec.build)]
    if None not in names and names[0] != names[1]:
        raise PluginError(f"{where}: describe takes {_listed(names[0])}, build {_listed(names[1])}; both take the same")
    if needed(spec.describe) and not options:
        return
    import torch

    from mmft.modeling.picture_proof import built_part, prove, transformed

    with blamed(f"{where}: describe", spec.describe):
        info = spec.describe(**options)
    if not isinstance(info, VisionInfo):
        raise PluginError(f"{where}: describe gave a {type(info).__name__}, expected a VisionInfo")
    must_pickle(info.transform, f"{where}: the transform of describe")
    with blamed(where, spec.build):
        pixels = transformed(where, info)[None]
        expected = (1, info.num_patches, info.hidden_size)
        why = f"describe says num_patches={info.num_patches} and hidden_size={info.hidden_size}; correct describe"
        once, again = (
            prove(where, built_part(where, spec.build, **options), pixels, expected, why, torch.float32)
            for _ in range(2)
        )
    if not torch.equal(once, again):
        raise PluginError(
            f"{where}: built twice it gives other features; a frozen encoder is not saved, so load its weights, or "
            "seed what is random"
        )


def check_projector(spec: ProjectorSpec, **options: Any) -> None:
    """The module gives as many tokens as `num_tokens` says, as wide as it was asked for, of finite numbers.

    Raises `PluginError`.
    """
    if needed(spec.build, given=2) and not options:
        return
    import torch

    from mmft.modeling.picture_proof import built_part, prove

    where = f"projector {spec.name!r}"
    patches, tokens = _tokens(where, spec, options)
    with blamed(where, spec.build):
        module = built_part(where, spec.build, *WIDTHS, **options)
        features = torch.linspace(-1, 1, patches * WIDTHS[0]).reshape(1, patches, WIDTHS[0])
        why = f"build was asked for {WIDTHS[1]} features, and num_tokens({patches}) gave {tokens}; correct num_tokens"
        prove(where, module, features, (1, tokens, WIDTHS[1]), why, torch.float32)


def _tokens(where: str, spec: ProjectorSpec, options: Mapping[str, Any]) -> tuple[int, int]:
    """A number of patches that fits the options, and the tokens they become."""
    refusals = []
    for patches in PATCHES:
        with blamed(f"{where}: num_tokens", spec.num_tokens):
            try:
                tokens = spec.num_tokens(patches, **options)
            except ValueError as error:
                refusals.append(str(error))
                continue
        if not isinstance(tokens, int) or tokens < 1:
            raise PluginError(f"{where}: num_tokens({patches}) gave {tokens!r}, expected a whole number above 0")
        return patches, tokens
    raise PluginError(f"{where}: num_tokens refuses {', '.join(map(str, PATCHES))} patches: {refusals[-1]}")


def check_dataset(spec: DatasetSpec, **options: Any) -> None:
    """`load` gives records, twice the same; `load_from` the rest of them; the files are there. Its first records only.

    Suffixes are in lower case, with the dot, and `load` then takes `path`. Raises `PluginError`.
    """
    where = f"data source {spec.name!r}"
    for suffix in spec.suffixes:
        if not suffix.startswith(".") or suffix != suffix.lower():
            raise PluginError(f"{where}: the suffix {suffix!r} must begin with a dot and be in lower case")
    if spec.suffixes and not _takes(spec.load, "path"):
        raise PluginError(f"{where}: it has suffixes, so load must take path")
    if needed(spec.load) and not options:
        return
    records = _records(f"{where}: load", spec.load, **options)
    if not records:
        raise PluginError(f"{where}: load gives no record of what it was given")
    if records != _records(f"{where}: load", spec.load, **options):
        raise PluginError(f"{where}: load gives other records the second time; a run goes on by their numbers")
    for start in {0, 1, len(records) // 2} if spec.load_from else ():
        rest = _records(f"{where}: load_from({start})", spec.load_from, start, **options)
        if rest[: len(records) - start] != records[start:]:
            raise PluginError(f"{where}: load_from({start}) does not give what load gives after the first {start}")
    if spec.files:
        with blamed(f"{where}: files", spec.files):
            absent = [str(path) for path in spec.files(**options) if not Path(path).exists()]
        if absent:
            raise PluginError(f"{where}: files names {absent[0]}, which does not exist")


def _records(where: str, function: Any, *args: Any, **options: Any) -> list[Any]:
    with blamed(where, function):
        given = function(*args, **options)
        if not isinstance(given, Iterable | Iterator):
            raise PluginError(f"{where} gave a {type(given).__name__}, expected records one by one")
        records = list(islice(given, RECORDS))
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping | BadRecord):
            raise PluginError(f"{where}: record {number} is a {type(record).__name__}, expected a dict or a BadRecord")
    return records


def check_config_dir(spec: ConfigDir) -> None:
    """The folder is there, and each of its configs is one: it is executed, no file that it names is looked for.

    Raises `PluginError`.
    """
    from mmft.config.load import load_config
    from mmft.plugins import Plugins

    configs = sorted(path for path in spec.path.rglob("*.py") if path.stem != "__init__")
    if not configs:
        raise PluginError(f"config folder {spec.path}: {'no config in it' if spec.path.is_dir() else 'no such folder'}")
    for path in configs:
        with blamed(f"config folder {spec.path}", load_config):
            load_config(str(path), Plugins(()))


def _options_of(function: Callable[..., Any]) -> set[str] | None:
    """The names of its options; None where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        return None
    return {one.name for one in parameters}


def _listed(names: set[str] | None) -> str:
    return ", ".join(sorted(names or ())) or "nothing"
