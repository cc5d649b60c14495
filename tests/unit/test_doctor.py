"""`mmft doctor` on the machine the tests run on, and on one made worse."""

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from mmft import doctor
from mmft.cli import cli
from mmft.doctor import Finding, examine, lines_of
from mmft.plugins import Plugins, load_plugins


def problems(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.level == "problem"]


def test_the_machine_of_the_tests_is_in_order(plugins: Plugins, tmp_path: Path) -> None:
    findings = examine(plugins, work_dir=tmp_path / "not" / "there", low_disk=1)
    assert problems(findings) == []
    by_name = {finding.name: finding for finding in findings}
    assert "quantises and multiplies" in by_name["bitsandbytes 4-bit"].what
    assert by_name["transformers"].what.endswith("(<5.24,>=5.20)")  # the bounds of mmft's own metadata
    assert by_name["disk of runs"].what.endswith(f"at {tmp_path}")
    assert list(lines_of(findings))[-1] == "everything mmft needs is in order"


def test_every_problem_and_note_has_a_remedy(plugins: Plugins, tmp_path: Path) -> None:
    findings = examine(plugins, work_dir=tmp_path, low_disk=10**18)
    assert all(finding.remedy for finding in findings if finding.level != "ok")


def test_too_little_disk_is_a_problem(plugins: Plugins, tmp_path: Path) -> None:
    findings = examine(plugins, work_dir=tmp_path, low_disk=10**18)
    assert problems(findings) == ["disk of runs", "disk of models"]
    assert "2 problems" in list(lines_of(findings))[-1]


def test_a_plugin_that_does_not_load_is_named_with_its_reason(install: Callable[..., Path]) -> None:
    install("acme-mmft", "0.2.0", {"acme": "acme_broken"}, acme_broken="import acme_core_that_is_not_there")
    findings = list(doctor.broken_plugins(load_plugins()))
    assert problems(findings) == ["plugin acme"]
    assert "No module named 'acme_core_that_is_not_there'" in findings[-1].what
    assert findings[-1].remedy == "mend or uninstall acme-mmft 0.2.0"


def test_a_version_outside_of_the_bounds_is_a_problem_and_a_missing_extra_a_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = ["click>=99", "numpy>=1", "mmft_not_there>=2", "mmft_extra_not_there; extra == 'web'", "x; extra == 'dev'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    found = {finding.name: finding for finding in doctor.packages()}
    assert {name: finding.level for name, finding in found.items() if name != "python"} == {
        "click": "problem", "numpy": "ok", "mmft_not_there": "problem", "mmft_extra_not_there": "note",
    }  # fmt: skip
    assert found["click"].remedy == "pip install 'click>=99'"
    assert found["mmft_extra_not_there"].remedy == "pip install 'mmft[web]'"


def test_a_torchvision_for_another_torch_is_found_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What PyPI's build does beside a CPU torch, and what transformers then cannot import either."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = doctor.torchvision()
    assert found.level == "problem"
    assert "operator torchvision::nms does not exist" in found.what
    assert found.remedy.startswith("pip uninstall torchvision")


def test_a_4_bit_layer_without_gradient_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Silent(torch.nn.Linear):
        def __init__(self, inputs: int, outputs: int, **options: object) -> None:
            super().__init__(inputs, outputs, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() * 0

    import bitsandbytes as bnb

    monkeypatch.setattr(bnb, "nn", SimpleNamespace(Linear4bit=Silent))
    (found,) = doctor.quantization()
    assert found.level == "problem"
    assert "no gradient comes back" in found.what


def test_offline_variables_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [finding.level for finding in doctor.environment()] == ["note"]


class Hub(BaseHTTPRequestHandler):
    """A hub that answers every question with 401, as one does that asks for a login."""

    def do_HEAD(self) -> None:
        self.send_response(401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """No lines between the test names."""


def test_the_hub_is_asked_whether_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in doctor.OFFLINE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    (found,) = doctor.environment()
    assert found.level == "ok" and found.what == f"{url} answers (HF_HUB_OFFLINE=0, HF_ENDPOINT={url})"
    server.shutdown()
    server.server_close()
    (found,) = doctor.environment()
    assert found.level == "note" and found.what.startswith(f"{url} is not reached: ")
    assert "HF_ENDPOINT" in found.remedy and "model.hub='modelscope'" in found.remedy and "folder" in found.remedy


def test_a_package_of_several_extras_is_asked_for_by_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["mmft_gguf_x; extra == 'demo'", "mmft_onnx_x; extra == 'demo'", "mmft_gguf_x; extra == 'gguf'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    found = {finding.name: finding for finding in doctor.packages()}
    assert found["mmft_gguf_x"].what == "not installed; only needed for mmft[gguf], mmft[demo]"
    assert found["mmft_gguf_x"].remedy == "pip install 'mmft[gguf]'"
    assert found["mmft_onnx_x"].remedy == "pip install 'mmft[demo]'"


def test_a_check_that_fails_itself_does_not_end_the_others(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory() -> list[Finding]:
        raise ValueError("no such counter")

    monkeypatch.setattr(doctor, "memory", memory)
    findings = examine(plugins, work_dir=tmp_path, low_disk=1)
    assert problems(findings) == ["memory"]
    assert findings[-1].name == "plugins"


def test_the_exit_code_is_1_where_something_needed_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = lambda: CliRunner().invoke(  # noqa: E731
        cli, ["doctor", "--json", "--work-dir", str(tmp_path)], standalone_mode=False
    )
    assert run().return_value == 0
    monkeypatch.setattr(doctor, "requires", lambda name: ["mmft_not_there>=2"])
    broken = run()
    assert broken.return_value == 1
    told = json.loads(broken.output[broken.output.index("[\n") :])
    assert {"name": "mmft_not_there", "level": "problem"}.items() <= next(
        one for one in told if one["name"] == "mmft_not_there"
    ).items()
