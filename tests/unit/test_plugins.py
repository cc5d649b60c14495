"""The plugin loader: every trap pluggy leaves open is an error with an owner, and a broken plugin stops nobody else.

Plugins are installed for real: a folder on sys.path with a dist-info, found through its entry point.
"""

import importlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mmft import __version__
from mmft.cli import main
from mmft.errors import AmbiguousName, PluginError, UnknownName
from mmft.plugins import GROUP, Plugin, Plugins, listing, load_plugins, offers_text
from mmft.testing import check_plugin

Install = Callable[..., Path]

MAP = """
from mmft import Conversation, DataMap, Message, Text, hookimpl

def read(record):
    return Conversation((Message("user", (Text(record["q"]),)), Message("assistant", (Text(record["a"]),))))

@hookimpl
def mmft_data_maps():
    return [DataMap(name="NAME", fn=read, examples=({"q": "1", "a": "2"},))]
"""
HEAD = "from mmft import DataMap, hookimpl\n"


def acme(install: Install, source: str, name: str = "acme") -> Plugin:
    """The plugin of this source, loaded through a real entry point."""
    install(f"{name}-mmft", "0.2.0", {name: f"{name}_mod"}, **{f"{name}_mod": source})
    return next(plugin for plugin in load_plugins().plugins if plugin.name == name)


BROKEN = {
    "an unmarked hook": (
        "def mmft_data_maps():\n    return []\n",
        "acme_mod.mmft_data_maps (acme_mod.py:1) looks like a hook but is not marked with @mmft.hookimpl",
    ),
    "a misspelt hook": (
        HEAD + "@hookimpl\ndef mmft_data_map():\n    return []\n",
        "acme_mod.mmft_data_map (acme_mod.py:2): no such hook; did you mean 'mmft_data_maps'?; hooks: mmft_data_maps, ",
    ),
    "a misspelt and unmarked hook": (
        "def mmft_chat_template():\n    return []\n",
        "no such hook; did you mean 'mmft_chat_templates'?",
    ),
    "a parameter with a default": (
        HEAD + "@hookimpl\ndef mmft_check_config(config, plugins=None):\n    return []\n",
        "acme_mod.mmft_check_config (acme_mod.py:2): parameter 'plugins' has a default; hook parameters have none",
    ),
    "a keyword-only parameter": (
        HEAD + "@hookimpl\ndef mmft_callbacks(*, config):\n    return []\n",
        "parameter 'config' is keyword-only",
    ),
    "a parameter the hook does not have": (
        HEAD + "@hookimpl\ndef mmft_callbacks(config, trainer):\n    return []\n",
        "acme_mod.mmft_callbacks (acme_mod.py:2): an event hook without a parameter 'trainer'; it has config",
    ),
    "a parameter on a catalog": (
        HEAD + "@hookimpl\ndef mmft_data_maps(config):\n    return []\n",
        "acme_mod.mmft_data_maps (acme_mod.py:2): a catalog hook without a parameter 'config'; it takes none",
    ),
    "a marked function of another name": (
        HEAD + "@hookimpl\ndef data_maps():\n    return []\n",
        "acme_mod.data_maps (acme_mod.py:2): no such hook; did you mean 'mmft_data_maps'?",
    ),
    "a wrapper on a catalog": (
        HEAD + "@hookimpl(wrapper=True)\ndef mmft_data_maps():\n    return (yield)\n",
        "acme_mod.mmft_data_maps (acme_mod.py:2): a catalog hook cannot be a wrapper",
    ),
    "an old-style wrapper on a catalog": (
        HEAD + "@hookimpl(hookwrapper=True)\ndef mmft_data_maps():\n    yield\n",
        "a catalog hook cannot be a wrapper",
    ),
    "a generator that raises": (
        HEAD
        + "@hookimpl\ndef mmft_data_maps():\n    yield DataMap(name='a', fn=len)\n    raise RuntimeError('late')\n",
        "mmft_data_maps: RuntimeError: late (acme_mod.py:5)",
    ),
    "a catalog that raises": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    return 1 / 0\n",
        "mmft_data_maps: ZeroDivisionError: division by zero (acme_mod.py:4)",
    ),
    "a catalog that is no iterable": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    return 7\n",
        "mmft_data_maps (acme_mod.py:2) must return a list of DataMap objects, got one int",
    ),
    "a spec instead of a list": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    return DataMap(name='a', fn=len)\n",
        "mmft_data_maps (acme_mod.py:2) must return a list of DataMap objects, got one DataMap",
    ),
    "a forgotten return": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    [DataMap(name='a', fn=len)]\n",
        "mmft_data_maps (acme_mod.py:2) must return a list of DataMap objects, got None: is a `return` missing?",
    ),
    "a field of another version": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    return [DataMap(name='a', fn=len, column=())]\n",
        f"DataMap of mmft {__version__} has no field 'column'; did you mean 'columns'?; fields: name, fn, ",
    ),
    "a spec of another kind": (
        HEAD + "@hookimpl\ndef mmft_chat_templates():\n    return [DataMap(name='a', fn=len)]\n",
        "mmft_chat_templates (acme_mod.py:2) must return ChatTemplate objects, got DataMap",
    ),
    "a name with capitals": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    return [DataMap(name='My-Map', fn=len)]\n",
        "the name 'My-Map' must be of a-z, 0-9 and _ only",
    ),
    "an empty name": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    return [DataMap(name='', fn=len)]\n",
        "the name '' must be of a-z, 0-9 and _ only",
    ),
    "one name twice in one catalog": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    return [DataMap(name='a', fn=len)] * 2\n",
        "mmft_data_maps (acme_mod.py:2) offers the name 'a' twice",
    ),
    "an import that fails": (
        "import acme_core\n",
        "ModuleNotFoundError: No module named 'acme_core' (acme_mod.py:1)",
    ),
    "an import that ends the program": ("import sys\nsys.exit(3)\n", "SystemExit: 3 (acme_mod.py:2)"),
    "a hook that ends the program": (
        HEAD + "@hookimpl\ndef mmft_data_maps():\n    raise SystemExit\n",
        "mmft_data_maps: SystemExit (acme_mod.py:4)",
    ),
    "a syntax error": ("def broken(:\n", "SyntaxError"),
}


@pytest.mark.parametrize("trap", BROKEN)
def test_a_broken_plugin_is_recorded_with_its_owner_and_reason(install: Install, trap: str) -> None:
    source, reason = BROKEN[trap]
    plugin = acme(install, source)
    assert reason in plugin.error
    assert plugin.origin == "plugin 'acme' from acme-mmft 0.2.0"
    assert plugin.offers == {} and plugin.module is None
    assert "\n" not in plugin.error


def test_an_entry_point_must_name_a_module_not_a_class(install: Install) -> None:
    install("acme-mmft", "0.2.0", {"acme": "acme_mod:Acme"}, acme_mod="class Acme:\n    pass\n")
    plugin = next(p for p in load_plugins().plugins if p.name == "acme")
    assert "the entry point names type" in plugin.error and "it must name a module" in plugin.error


@pytest.mark.parametrize("trap", BROKEN)
def test_a_broken_plugin_does_not_stop_the_others(install: Install, plugins: Plugins, trap: str) -> None:
    acme(install, BROKEN[trap][0])
    install("good-mmft", "1.0", {"good": "good_mod"}, good_mod=MAP.replace("NAME", "good_map"))
    loaded = load_plugins()
    assert [plugin.name for plugin in loaded.broken] == ["acme"]
    assert set(loaded.data_maps.names()) == {*plugins.data_maps.names(), "good_map"}


def test_the_message_for_an_unknown_name_lists_names_suggests_one_and_notes_the_broken_plugin(
    install: Install, plugins: Plugins
) -> None:
    acme(install, BROKEN["an import that fails"][0])
    with pytest.raises(UnknownName) as caught:
        load_plugins().chat_templates.get("vicunna")
    first, note, names = str(caught.value).split("\n")
    assert first == "no chat template named 'vicunna'; did you mean 'vicuna'?"
    assert names.startswith("    mmft plugins lists all ")
    assert note.strip() == (
        "note: plugin 'acme' from acme-mmft 0.2.0 failed to load and may offer it: "
        "ModuleNotFoundError: No module named 'acme_core' (acme_mod.py:1)"
    )


def test_with_no_plugins_at_all_the_message_says_that_mmft_is_not_installed() -> None:
    with pytest.raises(UnknownName, match=r"mmft is not installed in this environment; run: pip install -e \."):
        Plugins([]).data_maps.get("llava")


def test_a_plugin_installed_beside_ours_is_native(install: Install) -> None:
    assert acme(install, MAP.replace("NAME", "acme_map")).error == ""
    plugins = load_plugins()
    data_map = plugins.data_maps.get("acme_map")
    sample = data_map.fn({"q": "1", "a": "2"})
    assert sample is not None and sample.messages[1].text == "2"
    assert plugins.data_maps.get("acme/acme_map") is data_map
    assert plugins.data_maps.owner("acme_map").origin == "plugin 'acme' from acme-mmft 0.2.0"


def test_a_name_offered_twice_is_an_error_only_when_asked_for_and_the_qualified_name_works(install: Install) -> None:
    acme(install, MAP.replace("NAME", "alpaca"))
    plugins = load_plugins()
    assert plugins.broken == []
    with pytest.raises(AmbiguousName) as caught:
        plugins.data_maps.get("alpaca")
    assert str(caught.value) == (
        "data map 'alpaca' is offered by 2 plugins; write one of: acme/alpaca, text_sft/alpaca"
    )
    assert plugins.data_maps.get("acme/alpaca").fn.__module__ == "acme_mod"
    assert plugins.data_maps.get("text_sft/alpaca").fn.__module__ == "mmft_plugins.text_sft"
    assert [plugin.name for plugin in plugins.data_maps.owners("alpaca")] == ["acme", "text_sft"]
    with pytest.raises(UnknownName):
        plugins.data_maps.get("llava/alpaca")


def test_two_distributions_with_one_plugin_name_are_both_refused_and_both_named(install: Install) -> None:
    install("one-mmft", "1.0", {"acme": "one_mod"}, one_mod=MAP.replace("NAME", "one"))
    install("two-mmft", "2.0", {"acme": "two_mod"}, two_mod=MAP.replace("NAME", "two"))
    broken = {plugin.name: plugin.error for plugin in load_plugins().broken}
    assert broken == {
        "acme@one-mmft 1.0": "the plugin name 'acme' is also used by two-mmft 2.0; uninstall one of the two",
        "acme@two-mmft 2.0": "the plugin name 'acme' is also used by one-mmft 1.0; uninstall one of the two",
    }


def test_a_module_given_by_hand_under_the_name_of_an_installed_plugin_is_an_error_not_a_crash() -> None:
    module = ModuleType("llava")
    assert any("llava" in plugin.error for plugin in load_plugins((module,)).plugins)


def test_an_installed_plugin_can_be_checked_by_its_author() -> None:
    """`check_plugin(module)` in the author's own test suite, where the plugin is installed too."""
    module = importlib.import_module("mmft_plugins.pretrain")
    assert check_plugin(module) == ["pretrain"]


def test_the_same_module_given_twice_loads_once(install: Install) -> None:
    install("x", "1", {}, twice_mod=MAP.replace("NAME", "twice"))
    module = importlib.import_module("twice_mod")
    assert load_plugins((module, module)).data_maps.get("twice").name == "twice"


EVENT = HEAD + "from mmft import Problem\n@hookimpl\ndef mmft_check_config(config):\n    BODY\n"


def test_an_event_gives_the_results_of_all_plugins_in_the_order_of_their_names(install: Install) -> None:
    acme(install, EVENT.replace("BODY", "yield Problem('a', str(config))"))
    acme(install, EVENT.replace("BODY", "return None"), name="none")
    acme(install, EVENT.replace("BODY", "return [Problem('z', str(config))]"), name="zeta")
    problems = load_plugins().call("mmft_check_config", config=7, plugins=None)
    assert [str(problem) for problem in problems] == ["a: 7", "z: 7"]


@pytest.mark.parametrize("body", ["raise RuntimeError('no')", "yield 1; raise RuntimeError('no')", "exit('no')"])
def test_an_event_that_raises_is_attributed_to_its_plugin(install: Install, body: str) -> None:
    acme(install, EVENT.replace("BODY", body))
    with pytest.raises(
        PluginError, match=r"^plugin 'acme' from acme-mmft 0.2.0, mmft_check_config: \w+: no \(acme_mod"
    ):
        load_plugins().call("mmft_check_config", config=7, plugins=None)


def test_a_wrapper_on_an_event_sees_the_other_plugins_or_is_refused(install: Install) -> None:
    acme(install, EVENT.replace("BODY", "return [Problem('a', 'seen')]"))
    wrapper = "def mmft_check_config(config):\n    found = yield\n    return [[Problem('w', str(found))]]\n"
    wrapped = acme(install, EVENT.partition("@")[0] + "@hookimpl(wrapper=True)\n" + wrapper, name="wrap")
    results = load_plugins().call("mmft_check_config", config=7, plugins=None)
    assert wrapped.error or any(problem.where == "w" and "seen" in problem.what for problem in results)


def test_the_plugins_command_lists_offers_and_why_one_did_not_load(
    install: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    acme(install, MAP.replace("NAME", "alpaca"))
    acme(install, BROKEN["an import that fails"][0], name="foo")
    monkeypatch.setattr(sys, "argv", ["mmft", "plugins"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    rows = dict(lines)
    assert rows["NAME"].split() == ["FROM", "OFFERS"]
    assert rows["acme"].split(maxsplit=2) == ["acme-mmft", "0.2.0", "data maps: alpaca (also offered by text_sft)"]
    assert rows["foo"].endswith("NOT LOADED  ModuleNotFoundError: No module named 'acme_core' (foo_mod.py:1)")
    monkeypatch.setattr(sys, "argv", ["mmft", "plugins", "--json"])
    with pytest.raises(SystemExit):
        main()
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["foo"]["error"] and entries["foo"]["from"] == "foo-mmft 0.2.0"
    assert entries["acme"]["offers"] == {"data maps": ["alpaca"]}
    assert entries["acme"]["also"] == {"alpaca": ["text_sft"]}
    assert entries["text_sft"]["also"] == {"alpaca": ["acme"]}


def test_the_listing_names_the_events_a_plugin_takes_part_in(install: Install) -> None:
    acme(install, EVENT.replace("BODY", "return []"))
    entry = next(entry for entry in listing(load_plugins()) if entry["name"] == "acme")
    assert entry["hooks"] == ["mmft_check_config"]
    assert offers_text(entry) == "hooks: mmft_check_config"


def test_every_entry_point_of_pyproject_is_installed_and_loads(plugins: Plugins) -> None:
    import tomllib

    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    names = set(declared["entry-points"][GROUP])
    ours = {plugin.name: plugin.error for plugin in plugins.plugins if plugin.distribution.startswith("mmft ")}
    assert ours == dict.fromkeys(names, ""), "entry points changed: run `pip install -e .` again"


def test_a_spec_looked_up_by_name_pickles_into_the_same_function(plugins: Plugins) -> None:
    """Workers get specs, never the plugin manager, which cannot be pickled."""
    data_map = plugins.data_maps.get("llava")
    assert pickle.loads(pickle.dumps(data_map)).fn is data_map.fn
