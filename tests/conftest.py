"""Fixtures shared by all tests: the plugins, tiny real models built once a session, and distributions to install."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: idle threads must not spin on two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed prints into what the documents' sessions show

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as `pytest &` leaves it, for all processes started here too
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from mmft.plugins import Plugins, load_plugins
from mmft.testing import tiny_llm, tiny_vision


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    """No progress bars between the test names. Costs nothing where a test never imports transformers."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"


@pytest.fixture(autouse=True)
def log_of_its_own() -> None:
    """A run that a test, or a fixture of its module, trains here sets up the log; every test finds it untouched."""
    log = logging.getLogger("mmft")
    log.setLevel(logging.NOTSET)
    log.propagate, log.handlers[:] = True, []


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    """Every plugin installed here, as the command line sees them."""
    return load_plugins()


@pytest.fixture(scope="session")
def tiny_llm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a ChatML tokenizer of 400 tokens. Read it, do not write into it."""
    return tiny_llm(tmp_path_factory.mktemp("tiny") / "llm")


@pytest.fixture(scope="session")
def tiny_clip_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP vision encoder: 28 x 28 pixels, 16 patches."""
    return tiny_vision(tmp_path_factory.mktemp("tiny") / "clip", "clip")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`install("acme-mmft", "0.2.0", {"acme": "acme_mod"}, acme_mod="...")`: a distribution, as pip would leave it.

    A folder on sys.path with the modules and a dist-info with entry_points.txt. Its modules are forgotten afterwards.
    """
    before = set(sys.modules)

    def install(name: str, version: str, points: Mapping[str, str], **modules: str) -> Path:
        site = tmp_path / "site" / name
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
        lines = "".join(f"{key} = {value}\n" for key, value in points.items())
        (info / "entry_points.txt").write_text(f"[mmft]\n{lines}", "utf-8")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source, "utf-8")
        monkeypatch.syspath_prepend(str(site))
        return site

    yield install
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "") or ""):
            del sys.modules[name]
