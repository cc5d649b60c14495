"""Models to push, as training and conversions leave them, of somebody with a home folder and a name."""

import hashlib
import json
import platform
from pathlib import Path

from click.testing import CliRunner

from mmft.cli import cli
from mmft.convert.push.files import stage
from mmft.convert.push.model_card import Wishes
from mmft.convert.push.push import Plan, plan_push
from mmft.errors import MmftError

HOME, HOST = "/home/ming-the-person", "mings-laptop.local"
LLM, ENCODER = f"{HOME}/models/base-1b", f"{HOME}/.cache/huggingface/hub/models--acme--clip/snapshots/0123abc"


def be_somebody(monkeypatch) -> None:
    """The machine of somebody with a home folder and a name, who is not logged in anywhere."""
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setattr(platform, "node", lambda: HOST)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def manifest(folder: Path, **more) -> None:
    """`mmft.json` over what is in the folder, as training writes it."""
    lora = {"r": 8, "alpha": 16.0}
    model = {
        "llm": {"path": LLM, "quantization": "nf4", "lora": lora, "revision": None},
        "vision": {"encoder": {"use": "clip", "path": ENCODER}, "projector": {"use": "mlp2x_gelu"}},
    }
    datasets = [
        {
            "source": {"use": "json", "path": f"{HOME}/data/mine.json"},
            "data_map": "llava",
            "image_folder": "/mnt/d/img",
        },
        {"source": {"use": "hf", "path": "acme/chats"}, "data_map": "messages", "limit": 100},
    ]
    content = {
        "format": 1, "mmft": "0.1.0", "model": model, "chat_template": "chatml", "precision": "bf16", "plugins": {},
        "config": {
            "model": model, "data": {"datasets": datasets, "chat_template": "chatml", "max_length": 64},
            "optim": {"lr": 1e-4}, "runtime": {"seed": 42, "precision": "bf16"},
        },
    }  # fmt: skip
    files = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    write(folder / "mmft.json", content | {"files": files} | more)


def model_folder(folder: Path, **more) -> Path:
    write(folder / "projector.safetensors", b"\x08\0\0\0\0\0\0\0{}      ")
    write(folder / "llm_adapter" / "adapter_model.safetensors", b"weights")
    write(folder / "llm_adapter" / "adapter_config.json", {"base_model_name_or_path": LLM, "r": 8})
    write(folder / "llm_adapter" / "README.md", f"base_model: {LLM}")
    write(folder / "tokenizer" / "tokenizer.json", {"model": {"vocab": {HOME: 1}}})
    manifest(folder, **more)
    return folder


def finished_run(work: Path) -> Path:
    """A finished run with everything that a run leaves behind."""
    folder = work / "work_dirs" / "run"
    model_folder(folder / "final")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "train_state.json"):
        write(folder / "final" / name, "{}")  # nobody puts them there; they would not go even then
    write(folder / "checkpoint-2" / "optimizer.pt", b"x")
    write(folder / "samples" / "step-2.json", {"images": [f"{HOME}/me.png"]})
    write(folder / "run.log", f"2026-01-01 10:00:00,000 INFO reading {HOME}/data\n")
    write(folder / "metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "seconds": 7200}\n{"ste')
    return folder


def plan(model, *, wishes: Wishes | None = None, **options) -> Plan:
    return plan_push(str(model), "ming/mine", "huggingface", wishes=wishes or Wishes(), **options)


def converted(folder: Path, parity: dict | None) -> Path:
    write(folder / "config.json", {"model_type": "llava", "vision_config": {}})
    write(folder / "model.safetensors", b"weights")
    if parity is not None:
        write(folder / "parity.json", parity)
    return folder


VERIFIED = {
    "verified": True,
    "dtype": "float32",
    "tolerance": 1e-4,
    "outcomes": [{"relative": 1e-6, "same_answer": True}],
}


def staged(planned, tmp_path) -> Path:
    (tmp_path / "staged").mkdir()
    stage(list(planned.uploads), tmp_path / "staged")
    return tmp_path / "staged"


def invoke(*arguments) -> str:
    result = CliRunner().invoke(cli, ["convert", "push", *map(str, arguments)], standalone_mode=False)
    if isinstance(result.exception, MmftError):
        return f"error: {result.exception}"
    assert result.exception is None, result.output
    return result.output
