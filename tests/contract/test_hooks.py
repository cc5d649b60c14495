"""Each hook is specified, documented with its exact arguments, and safe to implement on every pluggy."""

import inspect
import pickle
import re
from pathlib import Path

import pytest

from mmft import hookspecs
from mmft.plugins import CATALOGS, EVENTS, Plugins

HOOKS = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("mmft_")}
DOCS = Path(__file__).parents[2] / "docs" / "hooks.md"
SPECS = [
    "data_maps",
    "chat_templates",
    "vision_encoders",
    "projectors",
    "datasets",
    "system_texts",
    "tools",
]


def arguments(hook: str) -> str:
    return ", ".join(inspect.signature(HOOKS[hook]).parameters)


def test_the_loader_knows_every_hook_that_is_specified() -> None:
    assert set(HOOKS) == {*CATALOGS, *EVENTS} and len(HOOKS) == 11


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_says_what_it_is_and_since_when(hook: str) -> None:
    text = inspect.getdoc(HOOKS[hook]) or ""
    assert re.match(rf"{'Catalog' if hook in CATALOGS else 'Event'}: \S.+\. Added in \d+\.\d+\.$", text), text


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_typed_and_takes_plain_arguments_only(hook: str) -> None:
    signature = inspect.signature(HOOKS[hook])
    assert signature.return_annotation is not inspect.Parameter.empty
    for parameter in signature.parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameter.default is inspect.Parameter.empty and parameter.annotation is not inspect.Parameter.empty
    assert hook not in CATALOGS or not signature.parameters


@pytest.mark.parametrize("hook", HOOKS)
def test_no_hook_depends_on_the_order_of_plugins(hook: str) -> None:
    options = HOOKS[hook].mmft_spec
    assert not options["firstresult"] and not options["historic"]


def test_docs_list_each_hook_with_its_exact_arguments_and_no_other() -> None:
    """Headings such as "### `mmft_check_config(config, plugins)`"."""
    headings = re.findall(r"^#{2,4} `(mmft_\w+\([^`]*\))`", DOCS.read_text("utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(f"{hook}({arguments(hook)})" for hook in HOOKS)


@pytest.mark.parametrize("kind", SPECS)
def test_every_shipped_spec_pickles_into_an_equal_one(kind: str, plugins: Plugins) -> None:
    """Specs go to DataLoader workers; the plugin manager does not."""
    specs = list(getattr(plugins, kind))
    assert specs
    for spec in specs:
        assert repr(pickle.loads(pickle.dumps(spec))) == repr(spec)


@pytest.mark.parametrize("kind", SPECS)
def test_every_shipped_spec_has_one_owner_and_says_what_it_is(kind: str, plugins: Plugins) -> None:
    catalog = getattr(plugins, kind)
    for name in catalog.names():
        (owner,) = catalog.owners(name)
        assert owner.distribution.startswith("mmft ")
        spec = catalog.get(name)
        assert getattr(spec, "summary", "") or getattr(spec, "source", ""), name
