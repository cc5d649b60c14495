"""What plugins offer, by kind and name: `Plugins` is built once by the command line and passed down.

Beside the names it knows, for a trained model, who provided each of its parts when it was trained (`as_trained`).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

from mmft.errors import AmbiguousName, PluginError, UnknownName, closest, did_you_mean
from mmft.plugins.places import described
from mmft.specs import (
    ChatTemplate,
    ConfigDir,
    DataMap,
    DatasetSpec,
    ProjectorSpec,
    SystemText,
    Tool,
    VisionEncoderSpec,
)

CATALOGS: dict[str, type] = {
    "mmft_data_maps": DataMap,
    "mmft_chat_templates": ChatTemplate,
    "mmft_vision_encoders": VisionEncoderSpec,
    "mmft_projectors": ProjectorSpec,
    "mmft_datasets": DatasetSpec,
    "mmft_system_texts": SystemText,
    "mmft_tools": Tool,
    "mmft_config_dirs": ConfigDir,
}
EVENTS = ("mmft_check_config", "mmft_callbacks", "mmft_add_commands")
LISTED, CLOSE = 12, 5  # names in an error: all where there are so many at most, else this many
OURS = "mmft"  # our own distribution: another version of it opens what this one trained, so nothing is said


class Named(Protocol):
    """What a catalog holds."""

    @property
    def name(self) -> str:
        """Its short name."""
        ...


T = TypeVar("T", bound=Named)


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin: its entry-point name, where it comes from, and why it did not load, if it did not.

    `unmet` says which mmft its distribution asks for, where that is not this one. `digest` is the sha256 of the code of
    a module that no distribution has a version for.
    """

    name: str
    distribution: str = ""
    error: str = ""
    offers: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    hooks: dict[str, Callable[..., Any]] = field(default_factory=dict)
    module: ModuleType | None = None
    unmet: str = ""
    digest: str = ""

    @property
    def origin(self) -> str:
        """`plugin 'acme' from acme-mmft 0.2.0`."""
        source = f" from {self.distribution}" if self.distribution else ""
        return f"plugin {self.name!r}{source}" + (f" ({self.unmet})" if self.unmet else "")

    @property
    def identity(self) -> str:
        """What a trained model records: `acme-mmft 0.2.0`, or of a single file `my_map sha256:0123456789abcdef`."""
        version = f" sha256:{self.digest[:16]}" if self.digest else ""
        return self.distribution or f"{self.name}{version}"

    def is_source_of(self, identity: str) -> bool:
        """Whether a recorded identity is this plugin's, in whatever version."""
        return _source(self.identity) == _source(identity)


def _source(identity: str) -> str:
    return identity.partition(" ")[0]


class Catalog(Generic[T]):
    """Everything plugins offer of one kind. Iterating gives the specs, sorted by name.

    `recorded` is the identity of the plugin that a trained model has a name from: it decides among several owners.
    """

    def __init__(
        self, kind: str, hook: str, plugins: Sequence[Plugin], recorded: Mapping[str, str] | None = None
    ) -> None:
        self.kind = kind
        self._plugins = plugins
        self._recorded = recorded or {}
        self._owners: dict[str, dict[str, tuple[Plugin, T]]] = {}
        for plugin in plugins:
            for spec in plugin.offers.get(hook, ()):
                self._owners.setdefault(spec.name, {})[plugin.name] = (plugin, spec)

    def __iter__(self) -> Iterator[T]:
        for name in sorted(self._owners):
            for plugin in sorted(self._owners[name]):
                yield self._owners[name][plugin][1]

    def names(self) -> list[str]:
        """The short names, sorted."""
        return sorted(self._owners)

    def owners(self, name: str) -> list[Plugin]:
        """The plugins that offer this short name."""
        return [plugin for plugin, _ in self._owners.get(name, {}).values()]

    def owner(self, name: str) -> Plugin:
        """The plugin that a name, short or qualified, is taken from. Raises as `get` does."""
        return self._find(name)[0]

    def get(self, name: str) -> T:
        """The spec of this name; `plugin/name` chooses among several owners.

        Raises `UnknownName` with the names there are, and `AmbiguousName` where two plugins offer it.
        """
        return self._find(name)[1]

    def replaced(self) -> Iterator[tuple[str, str, str]]:
        """(`projector mlp`, who it was trained with, who offers it now) of each name another plugin now answers for."""
        for name, recorded in self._recorded.items():
            try:
                found = self.owner(name)
            except (UnknownName, AmbiguousName):
                continue  # whoever asks for it is told
            if found.identity != recorded and not _unversioned(found, recorded):
                yield f"{self.kind} {name}", recorded, found.identity

    def _find(self, name: str) -> tuple[Plugin, T]:
        qualifier, _, short = name.rpartition("/")
        owners = self._owners.get(short, {})
        if qualifier and qualifier in owners:
            return owners[qualifier]
        if not qualifier and len(owners) == 1:
            return next(iter(owners.values()))
        if not qualifier and owners:
            recorded = self._recorded.get(name)
            own = [pair for pair in owners.values() if recorded and pair[0].is_source_of(recorded)]
            if len(own) == 1:
                return own[0]
            choices = ", ".join(f"{plugin}/{short}" for plugin in sorted(owners))
            trained = f"; it was trained with that of {recorded}" if recorded else ""
            raise AmbiguousName(
                f"{self.kind} {name!r} is offered by {len(owners)} plugins; write one of: {choices}{trained}"
            )
        raise UnknownName(self._unknown(name))

    def _unknown(self, name: str) -> str:
        """One line; with a line more for each plugin that did not load, before the names there are."""
        broken = [plugin for plugin in self._plugins if plugin.error]
        if not self._owners and not broken:
            return (
                f"no {self.kind} named {name!r}: no plugins found, mmft is not installed in this environment; "
                "run: pip install -e ."
            )
        recorded = self._recorded.get(name)
        hint = f": {self._how_to_get(recorded)}" if recorded else did_you_mean(name, self._owners)
        notes = "".join(
            f"\n    note: {plugin.origin} failed to load and may offer it: {plugin.error}" for plugin in broken
        )
        there = self._others(name)
        return f"no {self.kind} named {name!r}{hint}" + (f"{notes}\n    {there}" if notes else f"; {there}")

    def _others(self, name: str) -> str:
        """All names where they are few, else the closest after the one that is suggested, and who lists the rest."""
        if len(self._owners) <= LISTED:
            return f"available: {', '.join(self.names()) or 'none'}"
        others = closest(name, self._owners, CLOSE)[1:]
        return (f"close: {', '.join(others)}; " if others else "") + f"mmft plugins lists all {len(self._owners)}"

    def _how_to_get(self, recorded: str) -> str:
        here = next((plugin for plugin in self._plugins if plugin.is_source_of(recorded)), None)
        trained = f"it was trained with that of {recorded}"
        if here:
            why = "which did not load" if here.error else f"{here.identity}, which is here, does not offer it"
            return f"{trained}; {why}"
        version = recorded.partition(" ")[2]
        if version and not version.startswith("sha256:"):
            return f"{trained}, which is not here; install that, or give its file with mmft --plugin"
        return f"{trained}, a file; give it again: mmft --plugin {_source(recorded)}.py ..."


def _unversioned(found: Plugin, recorded: str) -> bool:
    """Whether two identities need not be equal: of mmft itself, and of a file recorded before files had a digest."""
    return found.is_source_of(recorded) and (_source(recorded) == OURS or " " not in recorded)


class Plugins:
    """All loaded plugins and their catalogs. `recorded` is the `plugins` of a trained model's `mmft.json`."""

    def __init__(self, plugins: Sequence[Plugin], recorded: Mapping[str, str] | None = None) -> None:
        self.plugins = tuple(sorted(plugins, key=lambda plugin: plugin.name))
        self.recorded = dict(recorded or {})
        self.data_maps: Catalog[DataMap] = self._catalog("data map", "mmft_data_maps")
        self.chat_templates: Catalog[ChatTemplate] = self._catalog("chat template", "mmft_chat_templates")
        self.vision_encoders: Catalog[VisionEncoderSpec] = self._catalog("vision encoder", "mmft_vision_encoders")
        self.projectors: Catalog[ProjectorSpec] = self._catalog("projector", "mmft_projectors")
        self.datasets: Catalog[DatasetSpec] = self._catalog("data source", "mmft_datasets")
        self.system_texts: Catalog[SystemText] = self._catalog("system text", "mmft_system_texts")
        self.tools: Catalog[Tool] = self._catalog("tool", "mmft_tools")

    def _catalog(self, kind: str, hook: str) -> Catalog[Any]:
        prefix = f"{kind} "
        recorded = {key.removeprefix(prefix): of for key, of in self.recorded.items() if key.startswith(prefix)}
        return Catalog(kind, hook, self.plugins, recorded)

    def as_trained(self, recorded: Mapping[str, str]) -> "Plugins":
        """The same plugins, for a trained model: a name that several offer is taken from whom `recorded` says."""
        return self if dict(recorded) == self.recorded else Plugins(self.plugins, recorded)

    @property
    def broken(self) -> list[Plugin]:
        """Plugins that did not load."""
        return [plugin for plugin in self.plugins if plugin.error]

    def config_dirs(self) -> list[tuple[Plugin, ConfigDir]]:
        """The folders of configs, with their owners."""
        return [(plugin, spec) for plugin in self.plugins for spec in plugin.offers.get("mmft_config_dirs", ())]

    def call(self, hook: str, **arguments: Any) -> list[Any]:
        """Call an event hook in each plugin; the results, flattened. An exception is attributed to its plugin."""
        results: list[Any] = []
        for plugin in self.plugins:
            if (function := plugin.hooks.get(hook)) is None:
                continue
            try:
                results.extend(function(**{name: arguments[name] for name in parameters(function)}) or ())
            except (Exception, SystemExit) as error:
                raise PluginError(f"{plugin.origin}, {hook}: {described(error, plugin.module)}") from error
        return results


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of what a hook wants to be given; `*args` and `**kwargs` get nothing."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [one.name for one in inspect.signature(function).parameters.values() if one.kind not in variable]


def names_of(specs: Iterable[Any]) -> list[str]:
    """The name of each spec; of a folder its path."""
    return [getattr(spec, "name", None) or str(spec.path) for spec in specs]
