"""Load plugins, guard each of them, and look their offers up by name."""

from mmft.plugins.catalog import CATALOGS, EVENTS, Catalog, Plugin, Plugins
from mmft.plugins.listing import listing, offers_text
from mmft.plugins.loading import GROUP, load_plugins, named_module, read_plugin

__all__ = [
    "CATALOGS",
    "EVENTS",
    "GROUP",
    "Catalog",
    "Plugin",
    "Plugins",
    "listing",
    "load_plugins",
    "named_module",
    "offers_text",
    "read_plugin",
]
