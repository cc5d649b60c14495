"""What `mmft plugins` shows."""

from typing import Any

from mmft.plugins.catalog import CATALOGS, EVENTS, Plugins, names_of


def listing(plugins: Plugins) -> list[dict[str, Any]]:
    """What `mmft plugins --json` prints: a dict a plugin, with the kinds and names it offers."""
    owners: dict[tuple[str, str], list[str]] = {}
    for plugin in plugins.plugins:
        for hook, specs in plugin.offers.items():
            for name in names_of(specs):
                owners.setdefault((hook, name), []).append(plugin.name)
    entries = []
    for plugin in plugins.plugins:
        named = {hook: names_of(specs) for hook, specs in plugin.offers.items()}
        also = {
            name: [other for other in owners[hook, name] if other != plugin.name]
            for hook, names in named.items()
            for name in names
        }
        entries.append(
            {
                "name": plugin.name,
                "from": plugin.distribution,
                "offers": {_kind(hook): names for hook, names in named.items()},
                "hooks": [hook for hook in EVENTS if hook in plugin.hooks],
                "error": plugin.error,
                "unmet": plugin.unmet,
                "also": {name: others for name, others in also.items() if others},
            }
        )
    return entries


def _kind(hook: str) -> str:
    assert hook in CATALOGS
    return hook.removeprefix("mmft_").replace("_", " ")


def offers_text(entry: dict[str, Any]) -> str:
    """One line: `chat templates: vicuna (also offered by llava) | hooks: mmft_callbacks`."""
    unmet = [entry["unmet"]] if entry["unmet"] else []
    if entry["error"]:
        return " | ".join([f"NOT LOADED  {entry['error']}", *unmet])

    def named(name: str) -> str:
        owners = entry["also"].get(name)
        return f"{name} (also offered by {', '.join(owners)})" if owners else name

    parts = [f"{kind}: {', '.join(map(named, names))}" for kind, names in entry["offers"].items()]
    return " | ".join([*unmet, *parts, *([f"hooks: {', '.join(entry['hooks'])}"] if entry["hooks"] else [])])
