"""Before a question is answered: the port, the name of the model, another engine."""

import logging
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mmft.chat.server.app import ServerOptions, bind
from mmft.chat.server.engines import command
from mmft.cli.serve import served_name
from mmft.errors import MmftError, ModelError


def test_a_port_in_use_is_one_clear_error_before_a_model_is_loaded() -> None:
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as taken,
        pytest.raises(MmftError, match=r"^cannot serve on 127\.0\.0\.1:\d+: Address already in use; give another"),
    ):
        bind(ServerOptions(port=taken.getsockname()[1]))


def test_nobody_is_let_wait_for_a_model_that_is_not_loaded_yet() -> None:
    with bind(ServerOptions(port=0)) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname())


def test_a_server_for_everybody_without_a_key_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mmft"):
        bind(ServerOptions(host="0.0.0.0", port=0, api_key="secret")).close()
        assert caplog.text == ""
        bind(ServerOptions(host="0.0.0.0", port=0)).close()
    assert "everybody who reaches this machine can ask; --api-key" in caplog.text


def test_without_its_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MmftError, match=r'^the server needs uvicorn; run: pip install "mmft\[serve\]"$'):
        bind(ServerOptions(port=0))


def test_a_model_is_called_what_its_folder_is_called(tmp_path: Path) -> None:
    for name in ("run/final", "run/checkpoint-5", "hf_model"):
        (tmp_path / name).mkdir(parents=True)
    given = (str(tmp_path / "run/final"), str(tmp_path / "run/checkpoint-5"), str(tmp_path / "hf_model"), "org/model")
    assert [served_name(name) for name in given] == ["run", "run/checkpoint-5", "hf_model", "org/model"]


def test_another_engine_is_told_the_options_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    line, surroundings = command("vllm", "org/model", {"port": 9, "api_key": "secret", "dtype": "bf16", "name": "m"})
    assert line[1:3] == ["serve", "org/model"]
    assert "--port 9 --dtype bfloat16 --served-model-name m" in " ".join(line)
    assert (surroundings, "secret" in line) == ({"VLLM_API_KEY": "secret"}, False)
    line, _ = command("transformers", "org/model", {})
    assert line[1:] == [
        "-m",
        "transformers.cli.transformers",
        "serve",
        "org/model",
        *("--host", "127.0.0.1", "--port", "8000"),
    ]


@pytest.mark.parametrize(
    ("engine", "model", "options", "message"),
    [
        ("transformers", None, {}, "--engine transformers needs a MODEL"),
        ("transformers", "org/model", {"api_key": "x"}, "--api-key: transformers has no such option; leave it out, or"),
        ("vllm", "org/model", {"max_waiting": 1}, "--max-waiting: vllm has no such option"),
        ("vllm", "run", {}, "vllm does not open; mmft convert hf .*run OUT, then mmft serve OUT --engine vllm"),
        ("vllm", "org/model", {}, "vllm is not installed here; where it is: vllm serve org/model"),
    ],
)
def test_another_engine_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, model: str | None, options: Any, message: str
) -> None:
    (tmp_path / "run/final").mkdir(parents=True)
    (tmp_path / "run/final/mmft.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ModelError, match=message):
        command(engine, model, options)
