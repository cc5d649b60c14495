"""The plugins mmft ships. Each module is one plugin, offered through the `mmft` entry-point group like anybody's."""
