"""`check_plugin`: every check that applies to what a plugin offers."""

import copy
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mmft.errors import PluginError
from mmft.plugins import read_plugin
from mmft.plugins.catalog import names_of
from mmft.specs import ChatTemplate, ConfigDir, DataMap, DatasetSpec, ProjectorSpec, Tool, VisionEncoderSpec
from mmft.testing.blame import blamed, must_pickle
from mmft.testing.parts import check_config_dir, check_dataset, check_projector, check_vision_encoder, needed
from mmft.testing.templates import check_chat_template
from mmft.types import Conversation, Document


def check_plugin(module: ModuleType, options: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Run every check that applies to what a plugin offers; returns the names of what was tried.

    `options` are those of an encoder, a projector or a data source, by its name: what has options without a default is
    tried only with them, and a chat template made for a tokenizer (`bind`) is not. Both must pickle all the same.

    Raises `PluginError` naming the offer and the rule it breaks.
    """
    plugin = read_plugin(module)
    if plugin.error:
        raise PluginError(f"{plugin.origin}: {plugin.error}")
    given, checked = dict(options or {}), []
    specs = [spec for specs in plugin.offers.values() for spec in specs]
    for spec, name in zip(specs, names_of(specs), strict=True):
        must_pickle(spec, name)
        if _check(spec, given.pop(name, {})):
            checked.append(name)
    if given:
        raise PluginError(f"{plugin.origin}: it offers no {next(iter(given))!r} to give options to")
    return checked


def _check(spec: Any, options: Mapping[str, Any]) -> bool:
    """Whether the functions of a spec were tried."""
    match spec:
        case ChatTemplate(bind=None):
            check_chat_template(spec)
        case DataMap():
            check_data_map(spec)
        case Tool():
            check_tool(spec)
        case ConfigDir():
            check_config_dir(spec)
        case VisionEncoderSpec():
            check_vision_encoder(spec, **options)
            return bool(options) or not needed(spec.describe)
        case ProjectorSpec():
            check_projector(spec, **options)
            return bool(options) or not needed(spec.build, given=2)
        case DatasetSpec():
            check_dataset(spec, **options)
            return bool(options) or not needed(spec.load)
        case ChatTemplate():
            return False
    return True


def check_data_map(data_map: DataMap) -> None:
    """Each example becomes a sample, and the record is left as it was."""
    from mmft.data.kinds import mapped

    where = f"data map {data_map.name!r}"
    if not data_map.examples:
        raise PluginError(f"{where}: give at least one example record")
    for record in data_map.examples:
        before = copy.deepcopy(record)
        with blamed(f"{where}, on its example {record!r}", data_map.fn):
            sample = mapped(data_map, record)
        if not isinstance(sample, Conversation | Document):
            raise PluginError(f"{where}: the example {record!r} gave {sample!r}, not a sample")
        if record != before:
            raise PluginError(f"{where} modifies the record it is given")


def check_tool(tool: Tool) -> None:
    """The schema is JSON, an object whose required names are among its properties, and `unavailable` tells or is None.

    The tool is not run.
    """
    where = f"tool {tool.name!r}"
    try:
        schema = json.loads(json.dumps(tool.schema))["function"]["parameters"]
    except (TypeError, ValueError) as error:
        raise PluginError(f"{where}: its parameters are no JSON: {error}") from error
    properties = schema.get("properties", {})
    if schema.get("type") != "object" or not isinstance(properties, dict):
        raise PluginError(f"{where}: its parameters must be the schema of an object, with 'properties'")
    if unknown := [name for name in schema.get("required", ()) if name not in properties]:
        raise PluginError(f"{where}: required, but not among its properties: {', '.join(unknown)}")
    if not tool.description.strip():
        raise PluginError(f"{where}: it has no description, by which a model chooses it")
    with blamed(f"{where}: unavailable()", tool.unavailable):
        reason = tool.unavailable()
    if not isinstance(reason, str | None):
        raise PluginError(f"{where}: unavailable() gave {reason!r}; it gives a text or None")
