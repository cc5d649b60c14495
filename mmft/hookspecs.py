"""The eleven hooks. A plugin is a module with functions of these names, marked with `mmft.hookimpl`.

Catalogs declare what a plugin offers; each is called once, per plugin, and returns frozen specs. Events take part in
a run. A hook implementation may leave out arguments it does not use and may not give them defaults (pluggy
versions disagree about those). There are no wrappers on catalogs, because each plugin's is called by itself.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from mmft.errors import Problem
from mmft.specs import ChatTemplate, ConfigDir, DataMap, DatasetSpec, ProjectorSpec, SystemText, Tool, VisionEncoderSpec

if TYPE_CHECKING:
    import click
    from transformers import TrainerCallback

    from mmft.config import TrainConfig
    from mmft.plugins import Plugins

hookspec = pluggy.HookspecMarker("mmft")
hookimpl = pluggy.HookimplMarker("mmft")


@hookspec
def mmft_data_maps() -> Iterable[DataMap]:
    """Catalog: data formats. Added in 0.1."""
    return ()


@hookspec
def mmft_chat_templates() -> Iterable[ChatTemplate]:
    """Catalog: chat templates. Added in 0.1."""
    return ()


@hookspec
def mmft_vision_encoders() -> Iterable[VisionEncoderSpec]:
    """Catalog: vision encoders. Added in 0.1."""
    return ()


@hookspec
def mmft_projectors() -> Iterable[ProjectorSpec]:
    """Catalog: projectors between a vision encoder and a language model. Added in 0.1."""
    return ()


@hookspec
def mmft_datasets() -> Iterable[DatasetSpec]:
    """Catalog: data sources. Added in 0.1."""
    return ()


@hookspec
def mmft_system_texts() -> Iterable[SystemText]:
    """Catalog: system texts by name. Added in 0.1."""
    return ()


@hookspec
def mmft_tools() -> Iterable[Tool]:
    """Catalog: tools that a model may call in chat. Added in 0.1."""
    return ()


@hookspec
def mmft_config_dirs() -> Iterable[ConfigDir]:
    """Catalog: folders of configs. Added in 0.1."""
    return ()


@hookspec
def mmft_check_config(config: "TrainConfig", plugins: "Plugins") -> Iterable[Problem]:
    """Event: say what is wrong with a config, before a weight is read. Added in 0.1."""
    return ()


@hookspec
def mmft_callbacks(config: "TrainConfig") -> Iterable["TrainerCallback"]:
    """Event: transformers callbacks that take part in training. Added in 0.1."""
    return ()


@hookspec
def mmft_add_commands(cli: "click.Group") -> None:
    """Event: add commands to the `mmft` command line. Added in 0.1."""
