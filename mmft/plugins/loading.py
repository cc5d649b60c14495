"""Find plugins, import each on its own and read what it offers; a broken one is recorded and the others keep working.

Nothing is registered by an import: `load_plugins()` reads the `mmft` entry-point group, and gives a `Plugins`.
"""

import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mmft import __version__, hookspecs
from mmft.errors import PluginError, did_you_mean
from mmft.plugins.catalog import CATALOGS, EVENTS, OURS, Plugin, Plugins, parameters
from mmft.plugins.places import described, raised_at, shown
from mmft.specs import NAME_PATTERN

GROUP = "mmft"


def load_plugins(extra_modules: Sequence[ModuleType] = ()) -> Plugins:
    """Load every plugin of the `mmft` entry-point group, and the given modules beside them."""
    plugins = []
    points = sorted(
        ((point.name, _distribution(point), point) for point in entry_points(group=GROUP)), key=lambda found: found[:2]
    )
    for name, distribution, point in points:
        clash = [other for same, other, _ in points if same == name and other != distribution]
        if clash:
            text = f"the plugin name {name!r} is also used by {clash[0]}; uninstall one of the two"
            plugins.append(Plugin(f"{name}@{distribution}", distribution, error=text))
            continue
        unmet = "" if distribution.startswith(f"{OURS} ") else unmet_by(point.dist)
        plugins.append(_guarded(name, distribution, point.value, point.load, unmet))
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
    return _guarded(module.__name__, "", module.__name__, lambda: module)


def named_module(reference: str) -> ModuleType:
    """The module that `--plugin` names: the path of a .py file, or a module that can be imported from here.

    Raises `PluginError` in one line where there is none, or it fails.
    """
    path = Path(reference)
    is_file = path.suffix == ".py" and path.is_file()
    if not is_file and len(path.parts) > 1:
        raise PluginError(f"--plugin {reference}: no such file; give the path of a .py file, or the name of a module")
    code = (path.parent if path.name == "__init__.py" else path).resolve()
    name = code.stem if is_file else reference.removesuffix(".py")
    folder = str(code.parent if is_file else Path.cwd())
    importlib.invalidate_caches()  # the file may be new
    try:
        known = _known_origin(name) if is_file else None
        if known and known.resolve() != path.resolve():
            raise PluginError(f"the module name {name!r} is already that of {known}; rename the file")
        sys.path.insert(0, folder)
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(folder)
    except PluginError as error:
        raise PluginError(f"--plugin {reference}: {error}") from error
    except ModuleNotFoundError as error:
        text = str(error) if error.name == name else described(error, name)
        raise PluginError(f"--plugin {reference}: {text}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"--plugin {reference}: {described(error, name)}") from error


def _known_origin(name: str) -> Path | None:
    """The file of the module that `import name` gives before any folder is added for it."""
    if "." in name:
        raise PluginError(f"a module cannot be named {name!r}; rename the file")
    if name in sys.modules:
        origin = getattr(sys.modules[name], "__file__", None) or name
    else:
        spec = importlib.util.find_spec(name)
        origin = spec.origin if spec else None
    return Path(origin) if origin else None


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else ""


def unmet_by(distribution: Distribution | None) -> str:
    """`needs mmft>=0.2; this is mmft 0.1.0`, where a distribution asks for another mmft than this one; else empty."""
    lines = (distribution.requires if distribution else None) or ()
    needed = [line for line in lines if re.match(r"mmft\b", line, re.IGNORECASE)]
    if not needed or __version__.startswith("0+"):  # a checkout that was never installed has no version
        return ""
    from packaging.requirements import InvalidRequirement, Requirement

    for line in needed:
        try:
            asked = Requirement(line)
        except InvalidRequirement:
            continue
        applies = asked.marker is None or asked.marker.evaluate({"extra": ""})
        if asked.name.lower() == OURS and applies and not asked.specifier.contains(__version__, prereleases=True):
            return f"needs mmft{asked.specifier}; this is mmft {__version__}"
    return ""


def _guarded(name: str, distribution: str, where: str, load: Callable[[], Any], unmet: str = "") -> Plugin:
    """Import one plugin, check its hooks and read its catalogs; any failure becomes `Plugin.error`."""
    try:
        module = load()
        if not inspect.ismodule(module):
            raise PluginError(f"the entry point names {type(module).__name__} {module!r}; it must name a module")
        hooks = _hooks_of(module)
        offers = {hook: _read_catalog(module, hook, hooks[hook]) for hook in CATALOGS if hook in hooks}
        digest = "" if distribution else _digest(module)
    except (Exception, SystemExit) as error:
        text = str(error) if isinstance(error, PluginError) else described(error, where)
        return Plugin(name, distribution, error=text, unmet=unmet)
    offers = {hook: specs for hook, specs in offers.items() if specs}
    return Plugin(name, distribution, offers=offers, hooks=hooks, module=module, unmet=unmet, digest=digest)


def _digest(module: ModuleType) -> str:
    """The sha256 of a module's source, of a package that of all its modules; empty where there is none."""
    file = Path(getattr(module, "__file__", None) or "")
    if not file.is_file():
        return ""
    digest = hashlib.sha256()
    for path in sorted(file.parent.rglob("*.py")) if hasattr(module, "__path__") else [file]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _hooks_of(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The hooks of a module, by name. Refuses unmarked, misspelt and wrapping ones, and foreign arguments."""
    hooks: dict[str, Callable[..., Any]] = {}
    for name, function in vars(module).items():
        options = getattr(function, "mmft_impl", None) if inspect.isfunction(function) else None
        if not inspect.isfunction(function) or (options is None and not name.startswith("mmft_")):
            continue
        where = f"{module.__name__}.{name}{_place(function)}"
        known = (*CATALOGS, *EVENTS)
        if name not in known:
            raise PluginError(f"{where}: no such hook{did_you_mean(name, known)}; hooks: {', '.join(known)}")
        if options is None:
            raise PluginError(f"{where} looks like a hook but is not marked with @mmft.hookimpl")
        kind = "a catalog" if name in CATALOGS else "an event"
        if options["wrapper"] or options["hookwrapper"]:  # each plugin is called by itself: it would wrap nothing
            raise PluginError(f"{where}: {kind} hook cannot be a wrapper")
        given = parameters(getattr(hookspecs, name))
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not inspect.Parameter.empty:
                raise PluginError(f"{where}: parameter {parameter.name!r} has a default; hook parameters have none")
            if parameter.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY):
                only = parameter.kind.description
                raise PluginError(f"{where}: parameter {parameter.name!r} is {only}; hook parameters are plain")
        if unknown := [one for one in parameters(function) if one not in given]:
            there = f"it has {', '.join(given)}" if given else "it takes none"
            raise PluginError(f"{where}: {kind} hook without a parameter {unknown[0]!r}; {there}")
        hooks[name] = function
    return hooks


def _place(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({shown(code.co_filename)}:{code.co_firstlineno})" if code else ""


def _read_catalog(module: ModuleType, hook: str, function: Callable[..., Any]) -> tuple[Any, ...]:
    spec_type = CATALOGS[hook]
    try:
        returned = function()
        wrong = isinstance(returned, (*CATALOGS.values(), str, dict)) or not isinstance(returned, Iterable)
        specs = () if wrong else tuple(returned)
    except (Exception, SystemExit) as error:
        foreign = _foreign_field(error)
        text = f"{foreign}{raised_at(error, module)}" if foreign else described(error, module)
        raise PluginError(f"{hook}: {text}") from error
    where = f"{hook}{_place(function)}"
    if wrong:
        found = "None: is a `return` missing?" if returned is None else f"one {type(returned).__name__}"
        raise PluginError(f"{where} must return a list of {spec_type.__name__} objects, got {found}")
    seen = set()
    for spec in specs:
        if not isinstance(spec, spec_type):
            raise PluginError(f"{where} must return {spec_type.__name__} objects, got {type(spec).__name__}: {spec!r}")
        name = getattr(spec, "name", None)
        if name is None:
            continue
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            raise PluginError(f"{where}: the name {name!r} must be of a-z, 0-9 and _ only")
        if name in seen:
            raise PluginError(f"{where} offers the name {name!r} twice")
        seen.add(name)
    return specs


def _foreign_field(error: BaseException) -> str:
    """What to say where a spec was given a field it does not have, as a plugin for another mmft may; else empty."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    spec = next((one for one in CATALOGS.values() if found and one.__name__ == found[1]), None)
    if found is None or spec is None:
        return ""
    fields = list(inspect.signature(spec).parameters)
    return (
        f"{found[1]} of mmft {__version__} has no field {found[2]!r}{did_you_mean(found[2], fields)}; fields: "
        f"{', '.join(fields)}; drop it, or install the mmft that the plugin was written for"
    )
