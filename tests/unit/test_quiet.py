"""What libraries say to each other stays off the screen, and nothing else does; which GPU a writing thread uses."""

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmft.cli import _quiet
from mmft.config import Prompt
from mmft.inference import Assistant
from mmft.train.callbacks import SampleChat
from mmft.types import Conversation


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("`torch.distributed.all_gather_into_tensor` is deprecated. Please use `all_gather_single` instead.", False),
        ("`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another.", False),
        ("`gradient_checkpointing_enable` is deprecated and will be removed in v6.", False),
        ("`torch.something_of_yours` is deprecated", True),
    ],
)
def test_warnings_about_names_that_only_libraries_use_are_not_shown(told: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _quiet()
        warnings.warn(told, FutureWarning, stacklevel=1)
    assert bool(seen) == shown


def test_attempts_to_reach_the_hub_are_not_listed_but_a_limit_is(caplog: pytest.LogCaptureFixture) -> None:
    _quiet()
    hub = logging.getLogger("huggingface_hub.utils._http")
    hub.propagate, before = True, hub.propagate
    with caplog.at_level(logging.WARNING, hub.name):
        hub.warning("'[Errno -2] Name or service not known' thrown while requesting HEAD https://huggingface.co/a")
        hub.warning("Retrying in 2s [Retry 2/5].")
        hub.warning("Rate limited. Waiting 9s before retry [Retry 1/5].")
    hub.propagate = before
    assert "Rate limited" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", [torch.device("cuda", 1)]), ("cpu", [])])
def test_an_answer_is_written_on_the_models_gpu_and_not_on_number_0(
    device: str, expected: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's current device belongs to the thread, and answers are written in one of their own."""
    taken: list[Any] = []
    hf = SimpleNamespace(decode=lambda *args, **options: "")
    assistant: Any = Assistant(
        SimpleNamespace(device=torch.device(device)),  # type: ignore[arg-type]
        SimpleNamespace(tokenizer=SimpleNamespace(hf=hf)),  # type: ignore[arg-type]
        SimpleNamespace(stop=()),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(Assistant, "prompt", lambda *args: None)
    monkeypatch.setattr(Assistant, "_stop_ids", lambda *args: [])
    monkeypatch.setattr(Assistant, "_write", lambda *args: None)
    assert list(assistant.stream(Conversation(()))) == []
    assert taken == expected


@pytest.mark.parametrize("tells", [True, False])
def test_a_sample_that_fails_on_all_ranks_is_told_by_the_first(
    tells: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        model: Any = torch.nn.Linear(1, 1)

        def answer(self, *args: Any) -> str:
            raise RuntimeError("no answer")

    Failing.model.device = torch.device("cpu")
    monkeypatch.setattr(logging.getLogger("mmft"), "propagate", True)
    assistant: Any = Failing()
    SampleChat(assistant, [Prompt(text="Hi")], 1, tmp_path, together=True, tells=tells).ask(1)
    assert ("failed: no answer" in caplog.text) == tells
