"""Load plugins, guard each of them, and look their offers up by name.

`load_plugins()` reads the `mmft` entry-point group. Each plugin is imported and asked for its catalogs on its own, so a
broken one is recorded with its owner and error and the others keep working. `Plugins` is an ordinary object: it is
built once by the command line and passed down; nothing is registered by an import.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, Generic, TypeVar

import pluggy

from mmft import hookspecs
from mmft.errors import AmbiguousName, PluginError, UnknownName, did_you_mean
from mmft.specs import (
    NAME_PATTERN,
    ChatTemplate,
    ConfigDir,
    DataMap,
    DatasetSpec,
    ProjectorSpec,
    SystemText,
    Tool,
    VisionEncoderSpec,
)

GROUP = "mmft"
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

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin: its entry-point name, where it comes from, and why it did not load, if it did not."""

    name: str
    distribution: str = ""
    error: str = ""
    offers: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    module: ModuleType | None = None

    @property
    def origin(self) -> str:
        """`plugin 'acme' from acme-mmft 0.2.0`."""
        return f"plugin {self.name!r}" + (f" from {self.distribution}" if self.distribution else "")


class Catalog(Generic[T]):
    """Everything plugins offer of one kind. Iterating gives the specs, sorted by name."""

    def __init__(self, kind: str, owned: Iterable[tuple[Plugin, T]], broken: Sequence[Plugin]) -> None:
        self.kind = kind
        self._broken = broken
        self._owners: dict[str, dict[str, tuple[Plugin, T]]] = {}
        for plugin, spec in owned:
            self._owners.setdefault(spec.name, {})[plugin.name] = (plugin, spec)  # type: ignore[attr-defined]

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

    def _find(self, name: str) -> tuple[Plugin, T]:
        qualifier, _, short = name.rpartition("/")
        owners = self._owners.get(short, {})
        if qualifier and qualifier in owners:
            return owners[qualifier]
        if not qualifier and len(owners) == 1:
            return next(iter(owners.values()))
        if not qualifier and owners:
            choices = ", ".join(f"{plugin}/{short}" for plugin in sorted(owners))
            raise AmbiguousName(f"{self.kind} {name!r} is offered by {len(owners)} plugins; write one of: {choices}")
        raise UnknownName(self._unknown(name))

    def _unknown(self, name: str) -> str:
        if not self._owners and not self._broken:
            return (
                f"no {self.kind} named {name!r}: no plugins found, mmft is not installed in this environment; "
                "run: pip install -e ."
            )
        notes = "".join(
            f"\n    note: {plugin.origin} failed to load and may offer it: {plugin.error}" for plugin in self._broken
        )
        hint = did_you_mean(name, self._owners)
        return f"no {self.kind} named {name!r}{hint}; available: {', '.join(self.names()) or 'none'}{notes}"


class Plugins:
    """All loaded plugins and their catalogs."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = tuple(sorted(plugins, key=lambda plugin: plugin.name))
        self._manager = _new_manager()
        for plugin in self.plugins:
            if plugin.module is not None:
                self._manager.register(plugin.module, name=plugin.name)
        self.data_maps: Catalog[DataMap] = self._catalog("data map", "mmft_data_maps")
        self.chat_templates: Catalog[ChatTemplate] = self._catalog("chat template", "mmft_chat_templates")
        self.vision_encoders: Catalog[VisionEncoderSpec] = self._catalog("vision encoder", "mmft_vision_encoders")
        self.projectors: Catalog[ProjectorSpec] = self._catalog("projector", "mmft_projectors")
        self.datasets: Catalog[DatasetSpec] = self._catalog("data source", "mmft_datasets")
        self.system_texts: Catalog[SystemText] = self._catalog("system text", "mmft_system_texts")
        self.tools: Catalog[Tool] = self._catalog("tool", "mmft_tools")

    def _catalog(self, kind: str, hook: str) -> Catalog[Any]:
        owned = ((plugin, spec) for plugin in self.plugins for spec in plugin.offers.get(hook, ()))
        return Catalog(kind, owned, self.broken)

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
        everyone = [plugin.module for plugin in self.plugins if plugin.module is not None]
        for plugin in self.plugins:
            if plugin.module is None or not hasattr(plugin.module, hook):
                continue
            caller = self._manager.subset_hook_caller(hook, [m for m in everyone if m is not plugin.module])
            try:
                for result in caller(**arguments):
                    results.extend(result or ())
            except Exception as error:
                raise PluginError(f"{plugin.origin}, {hook}: {type(error).__name__}: {error}") from error
        return results


def load_plugins(extra_modules: Sequence[ModuleType] = ()) -> Plugins:
    """Load every plugin of the `mmft` entry-point group, and the given modules beside them."""
    plugins = []
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, _distribution(point)))
    for point in points:
        clash = [_distribution(p) for p in points if p.name == point.name and _distribution(p) != _distribution(point)]
        if clash:
            text = f"the plugin name {point.name!r} is also used by {clash[0]}; uninstall one of the two"
            plugins.append(Plugin(f"{point.name}@{_distribution(point)}", _distribution(point), error=text))
            continue
        plugins.append(_guarded(point.name, _distribution(point), point.load))
    for module in extra_modules:
        if any(plugin.module is module for plugin in plugins):
            continue  # given twice, or installed as well
        plugin = read_plugin(module)
        if any(other.name == plugin.name for other in plugins):
            text = f"the plugin name {plugin.name!r} is also used by an installed plugin; rename the module"
            plugin = Plugin(f"{plugin.name}@{getattr(module, '__file__', None) or 'module'}", error=text)
        plugins.append(plugin)
    return Plugins(plugins)


def read_plugin(module: ModuleType) -> Plugin:
    """A module as a plugin, named after itself; what is wrong with it is in `error`."""
    return _guarded(module.__name__, "", lambda: module)


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else ""


def _guarded(name: str, distribution: str, load: Callable[[], Any]) -> Plugin:
    """Import one plugin, check its hooks and read its catalogs; any failure becomes `Plugin.error`."""
    try:
        module = load()
        if not inspect.ismodule(module):
            raise PluginError(f"the entry point names {type(module).__name__} {module!r}; it must name a module")
        _check_hooks(module)
        manager = _new_manager()
        manager.register(module, name=name)
        offers = {hook: _read_catalog(manager, hook, spec_type) for hook, spec_type in CATALOGS.items()}
    except Exception as error:
        text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        return Plugin(name, distribution, error=text)
    return Plugin(name, distribution, offers={k: v for k, v in offers.items() if v}, module=module)


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("mmft")
    manager.add_hookspecs(hookspecs)
    return manager


def _check_hooks(module: ModuleType) -> None:
    """Refuse what pluggy lets pass: unmarked, misspelt and defaulted hooks, and wrappers on catalogs."""
    known = (*CATALOGS, *EVENTS)
    for name, function in vars(module).items():
        if not name.startswith("mmft_") or not inspect.isfunction(function):
            continue
        where = f"{module.__name__}.{name}"
        if name not in known:
            raise PluginError(f"{where}: no such hook{did_you_mean(name, known)}; hooks: {', '.join(known)}")
        options = getattr(function, "mmft_impl", None)
        if options is None:
            raise PluginError(f"{where} looks like a hook but is not marked with @mmft.hookimpl")
        if options["wrapper"] or options["hookwrapper"]:  # each plugin is called by itself: it would wrap nothing
            kind = "a catalog" if name in CATALOGS else "an event"
            raise PluginError(f"{where}: {kind} hook cannot be a wrapper")
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                raise PluginError(f"{where}: parameter {parameter.name!r} has a default; hook parameters have none")
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                raise PluginError(f"{where}: parameter {parameter.name!r} is keyword-only; pluggy passes by position")


def _read_catalog(manager: pluggy.PluginManager, hook: str, spec_type: type) -> tuple[Any, ...]:
    specs = tuple(spec for result in getattr(manager.hook, hook)() for spec in result)
    seen = set()
    for spec in specs:
        if not isinstance(spec, spec_type):
            raise PluginError(f"{hook} must return {spec_type.__name__} objects, got {type(spec).__name__}: {spec!r}")
        name = getattr(spec, "name", None)
        if name is None:
            continue
        if not NAME_PATTERN.fullmatch(name):
            raise PluginError(f"{hook}: the name {name!r} must be of a-z, 0-9 and _ only")
        if name in seen:
            raise PluginError(f"{hook} offers the name {name!r} twice")
        seen.add(name)
    return specs


def listing(plugins: Plugins) -> list[dict[str, Any]]:
    """What `mmft plugins --json` prints: a dict a plugin, with the kinds and names it offers."""
    kinds = {hook: hook.removeprefix("mmft_").replace("_", " ") for hook in CATALOGS}
    entries = []
    for plugin in plugins.plugins:
        offers = {
            kinds[hook]: [getattr(spec, "name", None) or str(spec.path) for spec in specs]
            for hook, specs in plugin.offers.items()
        }
        hooks = [hook for hook in EVENTS if plugin.module is not None and hasattr(plugin.module, hook)]
        shared = {
            spec.name: [other.name for other in plugins.plugins if other is not plugin and _offers(other, hook, spec)]
            for hook, specs in plugin.offers.items()
            for spec in specs
            if hasattr(spec, "name")
        }
        entries.append(
            {
                "name": plugin.name,
                "from": plugin.distribution,
                "offers": offers,
                "hooks": hooks,
                "error": plugin.error,
                "also": {name: owners for name, owners in shared.items() if owners},
            }
        )
    return entries


def _offers(plugin: Plugin, hook: str, spec: Any) -> bool:
    return any(getattr(other, "name", None) == spec.name for other in plugin.offers.get(hook, ()))


def offers_text(entry: dict[str, Any]) -> str:
    """One line: `chat templates: vicuna (also offered by llava) | hooks: mmft_callbacks`."""
    if entry["error"]:
        return f"NOT LOADED  {entry['error']}"

    def named(name: str) -> str:
        owners = entry["also"].get(name)
        return f"{name} (also offered by {', '.join(owners)})" if owners else name

    parts = [f"{kind}: {', '.join(map(named, names))}" for kind, names in entry["offers"].items()]
    return " | ".join([*parts, *([f"hooks: {', '.join(entry['hooks'])}"] if entry["hooks"] else [])])
