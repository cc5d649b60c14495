"""A model that is not there: one short line with what can be done about it, before anything heavy is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mmft.cli import cli
from mmft.errors import MmftError
from mmft.hub import missing

UNREACHED = (
    "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached files.\n"
    "Check your internet connection or see how to run the library in offline mode at 'https://huggingface.co/docs'."
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)), standalone_mode=False)


def refusal(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, MmftError), (result.exception, result.output)
    return str(result.exception)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")


@pytest.mark.usefixtures("online")
def test_a_hub_that_is_not_reached_is_a_short_line_with_a_mirror_and_modelscope() -> None:
    said = missing("model.llm.path", "acme/llm", "huggingface", OSError(UNREACHED))
    assert said.startswith("model.llm.path: 'acme/llm' is no folder and was not found on huggingface: either the name ")
    for part in ("https://hub.example cannot be reached", "HF_ENDPOINT", "model.hub='modelscope'"):
        assert part in said
    assert "We couldn't connect" not in said and len(said) < 300
    assert "model.hub" not in missing("model", "acme/llm", "huggingface", OSError(UNREACHED))  # chat has no config


@pytest.mark.usefixtures("online")
def test_a_name_that_the_hub_does_not_know_is_not_called_a_network_problem() -> None:
    import httpx
    from huggingface_hub.errors import RepositoryNotFoundError

    answer = httpx.Response(404, request=httpx.Request("GET", "https://hub.example/acme/llm"))
    error = OSError("acme/llm is not a local folder and is not a valid model identifier")
    error.__cause__ = RepositoryNotFoundError("404", response=answer)
    said = missing("model", "acme/llm", "huggingface", error)
    assert said.endswith("was not found on huggingface: the name is wrong, or the model is private: hf auth login")


def test_an_adapter_folder_that_is_not_there_is_called_that(tiny_llm_path: Path, tmp_path: Path) -> None:
    said = refusal("chat", tiny_llm_path, "--adapter", tmp_path / "nope", "-m", "x")
    assert said == f"--adapter {tmp_path / 'nope'}: no such folder; give a folder with adapter_config.json"
    (tmp_path / "empty").mkdir()
    said = refusal("chat", tiny_llm_path, "--adapter", tmp_path / "empty", "-m", "x")
    assert said == f"--adapter {tmp_path / 'empty'}: holds no adapter_config.json; give a PEFT adapter folder"


def test_a_picture_that_is_not_there_is_called_that_before_a_model_is_looked_for(tmp_path: Path) -> None:
    said = refusal("chat", "no/model", "--image", tmp_path / "nope.png", "-m", "x")
    assert said == f"--image {tmp_path / 'nope.png'}: no such file"


LIGHT = """
import sys
from mmft.cli import main
try:
    main()
except SystemExit as end:
    print("ENDED", end.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize("verb", ["chat", "web"])
def test_without_a_run_chat_says_so_without_loading_torch(verb: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, verb], capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False
    )
    assert done.stderr == "mmft: error: no finished run under work_dirs; name a model folder or a run\n"
    assert done.stdout == "ENDED 2 False\n"


def test_a_template_that_is_not_the_models_own_is_noted_in_chat(
    tiny_llm_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note = "'vicuna' is not the chat template this model was made with; leave --prompt-template out for the model's own"
    for template, notes in (("vicuna", [note]), ("chatml", []), (None, [])):
        caplog.clear()
        choice = ["--prompt-template", template] if template else []
        assert run("chat", tiny_llm_path, "-m", "Hi", "--max-new-tokens", "1", *choice).exception is None
        assert [record.getMessage() for record in caplog.records if record.name == "mmft"] == notes


@pytest.mark.parametrize("size", [0, 10])
def test_a_checkpoint_that_is_cut_off_is_called_that(size: int, tmp_path: Path) -> None:
    from mmft.convert.importing.files import read_tensors

    path = tmp_path / "iter_500.pth"
    path.write_bytes(b"PK\x03\x04 cut off"[:size])
    with pytest.raises(MmftError) as caught:
        read_tensors(path)
    assert str(caught.value) == f"{path}: is empty or cut off ({size} bytes); copy it again"


def test_a_config_of_pth_to_hf_that_is_not_there_may_be_xtuners(tmp_path: Path) -> None:
    said = refusal("convert", "pth_to_hf", "a", tmp_path / "b", tmp_path / "c")
    assert said.startswith("no config file or shipped config named 'a'")
    assert said.endswith("; CONFIG may also be the .py file of an XTuner config")
