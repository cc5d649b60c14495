"""A small trained model that sees, as GGUF: whether llama.cpp answers as `mmft chat` does.

    python benchmarks/gguf_demo.py      (after `make demo`, whose parts it takes; llama-cpp-python must be there)

The demo's own model has a CLS token and a pixel-shuffle projector, which llama.cpp runs otherwise or not at all. So
DINOv2's weights are written as a SigLIP tower without CLS token; `mlp2x_gelu` and a LoRA adapter are trained on top of
it. The model is converted, and pictures of the test split are shown to both. A probe is a picture, its description and
a held-out question; it counts where both greedy answers are the same, character for character. Pictures are shown at
the encoder's size (56 x 56), where no resizing is needed, and as they are (64 x 64), where llama.cpp resizes itself.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, Vision, use
from mmft.plugins import Plugins

DEMO, ROOT = Path("work_dirs/demo"), Path("work_dirs/gguf_demo")
TOWER, START, RUN = ROOT / "tower", ROOT / "start" / "projector.safetensors", ROOT / "run"
SIZE, PATCH, WIDTH, BLOCKS = 56, 14, 384, 6
DESCRIBE = "Describe the picture."
NORM = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
RENAMED = {  # DINOv2's names of transformers, and SigLIP's
    "encoder.layer.": "encoder.layers.",
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attention.o_proj.": "self_attn.out_proj.",
    "attention.": "self_attn.",
    "embeddings.patch_embeddings.projection.": "embeddings.patch_embedding.",
}


def make_tower(folder: Path) -> None:
    """DINOv2's first blocks as a SigLIP model: no CLS token, layer scales multiplied in, tanh GELU as SigLIP's."""
    from transformers import AutoModel, SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=WIDTH // 64,
        image_size=SIZE, patch_size=PATCH, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6, vision_use_head=False,
    )  # fmt: skip
    tower = SiglipVisionModel(config)
    tower.load_state_dict(siglip_state(AutoModel.from_pretrained(DEMO / "dinov2").state_dict()))
    tower.save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, resample=3, **NORM).save_pretrained(folder)


def siglip_state(dino: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under SigLIP's names; the position table, 37 x 37, is interpolated to the picture's grid."""
    grid, whole = SIZE // PATCH, dino["embeddings.position_embeddings"][0, 1:]
    side = round(len(whole) ** 0.5)
    table = whole.T.reshape(1, -1, side, side)
    table = torch.nn.functional.interpolate(table, size=(grid, grid), mode="bicubic", antialias=True)
    state = {"embeddings.position_embedding.weight": table[0].flatten(1).T.contiguous()}
    for name, tensor in dino.items():
        block = name.removeprefix("encoder.layer.").split(".")[0]
        if name.startswith("layernorm."):
            state[name.replace("layernorm", "post_layernorm")] = tensor
        elif name.startswith("embeddings.patch") or (block.isdigit() and int(block) < BLOCKS):
            for old, new in RENAMED.items():
                name = name.replace(old, new, 1) if "self_attn" not in name else name
            state[name] = tensor
    for name in [name for name in state if "layer_scale" in name]:
        matrix = name.replace("layer_scale1.lambda1", "self_attn.out_proj").replace("layer_scale2.lambda1", "mlp.fc2")
        factor = state.pop(name)
        state[f"{matrix}.weight"] = state[f"{matrix}.weight"] * factor[:, None]
        state[f"{matrix}.bias"] = state[f"{matrix}.bias"] * factor
    return state


def make_start(file: Path, plugins: Plugins) -> None:
    """Where the projector begins: its first layer takes each channel less its mean, over its deviation.

    An MLP has no norm in front, and with features as the tower gives them it learns no captions in so few steps.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    from mmft.images import open_image

    llm = AutoConfig.from_pretrained(DEMO / "llm")
    words = AutoModel.from_pretrained(DEMO / "llm", dtype=torch.float32).get_input_embeddings().weight
    encoder: Any = plugins.vision_encoders.get("siglip")
    options = {"path": str(TOWER), "select_layer": BLOCKS}
    transform = encoder.describe(**options).transform
    pictures = torch.stack([transform(open_image(DEMO / "data" / "train" / f"{n}.png")) for n in range(64)])
    with torch.no_grad():
        features = encoder.build(**options)(pictures).flatten(0, 1)
    random = torch.Generator().manual_seed(0)
    first = torch.randn(llm.hidden_size, WIDTH, generator=random) / WIDTH**0.5 / features.std(0)
    # the mean square of GELU(x) for a normal x is 0.425; what comes out has the size of a word's embedding
    size = float(words.detach().square().mean().sqrt()) / (0.425 * llm.hidden_size) ** 0.5
    second = torch.randn(llm.hidden_size, llm.hidden_size, generator=random) * size
    state = {"0.weight": first, "0.bias": -first @ features.mean(0)}
    file.parent.mkdir(parents=True)
    save_file({**state, "2.weight": second, "2.bias": torch.zeros(llm.hidden_size)}, file)


def config_of(options: argparse.Namespace) -> TrainConfig:
    """One run on captions and conversations together: projector and adapter from the beginning."""
    data = DEMO / "data"
    sets = (("pretrain.json", options.captions), ("finetune.json", options.conversations))
    return TrainConfig(
        model=Model(
            llm=LLM(path=str(DEMO / "llm"), lora=Lora(r=16, alpha=32, dropout=0.0)),
            vision=Vision(
                encoder=use("siglip", path=str(TOWER), select_layer=BLOCKS, pad_to_square=True),
                projector=use("mlp2x_gelu"),
                projector_weights=START,
                feature_cache=ROOT / "features",
            ),
        ),
        data=Data(
            datasets=tuple(
                Dataset(
                    source=use("json", path=data / name), image_folder=data / "train", data_map="llava", limit=limit
                )
                for name, limit in sets
            ),
            chat_template="chatml",
            allow_template_difference=True,
            max_length=512,
        ),
        optim=Optim(lr=options.lr, betas=(0.9, 0.98), warmup_ratio=0.05, batch_size_per_device=4),
        runtime=Runtime(output_dir=RUN, precision=options.precision, logging_steps=5),
    )


@dataclass(frozen=True)
class Probe:
    """A picture of the test split, a question about it, and the true answer."""

    picture: str
    question: str
    truth: str


def choose(count: int) -> list[Probe]:
    """Held-out questions in turn of each kind, no picture twice; the choice is fixed."""
    records = json.loads((DEMO / "data" / "test_questions.json").read_text())
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(0)).tolist()
    kinds = sorted({record["kind"][0] for record in records})
    found: dict[str, Probe] = {}
    while len(found) < count:
        kind = kinds[len(found) % len(kinds)]
        record = next(records[n] for n in order if records[n]["kind"] == [kind] and records[n]["image"] not in found)
        question, truth = (turn["value"] for turn in record["conversations"])
        found[record["image"]] = Probe(record["image"], question.removeprefix("<image>\n"), truth)
    return list(found.values())


def show(probes: Sequence[Probe], folder: Path) -> None:
    """The probes' pictures at the encoder's size, resized as training resizes them."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for probe in probes:
        picture = Image.open(DEMO / "data" / "test" / probe.picture).convert("RGB")
        picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / probe.picture)


def ours(probes: Sequence[Probe], folders: Iterable[Path], plugins: Plugins, precision: str) -> list[list[str]]:
    """For each folder of pictures and each probe, both answers of a session of `mmft chat`."""
    from mmft.chat.session import ChatSession
    from mmft.generation import Generation
    from mmft.inference import load_assistant

    assistant = load_assistant(RUN / "final", plugins, device=torch.device("cpu"), precision=precision)
    found: list[list[str]] = []
    for folder in folders:
        found.append([])
        for probe in probes:
            session = ChatSession(assistant, Generation(max_new_tokens=24))
            said = ["".join(session.ask(DESCRIBE, [folder / probe.picture])), "".join(session.ask(probe.question))]
            found[-1].append(" | ".join(said))
    return found


def theirs(probes: Sequence[Probe], folders: Iterable[Path], plugins: Plugins, place: Path) -> list[list[str]]:
    """The same of llama.cpp, which opens the pictures itself."""
    from mmft.chat.session import answer
    from mmft.convert.gguf.run import LlamaCppResult
    from mmft.data.shape import describe_model
    from mmft.inference import user_message
    from mmft.modeling.checkpoint import read_manifest
    from mmft.types import Conversation

    tokenizer = describe_model(read_manifest(RUN / "final").model, plugins, RUN / "final").tokenizer
    found: list[list[str]] = []
    files = (next(place.glob("model-*.gguf")), next(place.glob("mmproj-*.gguf")))
    with LlamaCppResult(*files, tokenizer, None, longest=512) as model:
        model.own_pictures = True
        for folder in folders:
            found.append([])
            for probe in probes:
                turns, said = [user_message(DESCRIBE, [folder / probe.picture])], []
                for follows in (user_message(probe.question), None):
                    tokens = model.greedy(Conversation(tuple(turns)), 24)
                    said.append(str(tokenizer.hf.decode(tokens, skip_special_tokens=True)))
                    turns += [answer(said[-1]), follows] if follows else []
                found[-1].append(" | ".join(said))
    return found


def convert(quant: str) -> tuple[Path, dict[str, Any]]:
    """`mmft convert gguf`, and what its parity gate found. Ends the program where it refuses."""
    out = ROOT / quant
    if not (out / "parity.json").is_file():
        command = ["convert", "gguf", str(RUN), str(out), "--quant", quant, "--device", "cpu"]
        subprocess.run([sys.executable, "-m", "mmft", *command], check=True)
    return out, json.loads((out / "parity.json").read_text())


def prepare(options: argparse.Namespace, plugins: Plugins) -> None:
    """Tower, projector and run, where they are not there."""
    from mmft.train.run import train

    if not (DEMO / "data").is_dir():
        sys.exit(f"{DEMO}/data is not there; run `make demo`, or its first step, examples/demo/prepare.py")
    if options.new:
        shutil.rmtree(ROOT, ignore_errors=True)
    if not (RUN / "final" / "mmft.json").is_file():
        shutil.rmtree(ROOT, ignore_errors=True)  # an unfinished one
        make_tower(TOWER)
        make_start(START, plugins)
        if code := train(config_of(options), plugins):
            sys.exit(code)
        gc.collect()


def main() -> None:
    """Make, train, convert, ask, print."""
    from mmft.plugins import load_plugins

    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", type=int, default=480)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", default="bf16", help="of training")
    parser.add_argument("--quant", nargs="*", default=["f16", "q8_0"])
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--new", action="store_true", help="train anew")
    options, plugins = parser.parse_args(), load_plugins()
    prepare(options, plugins)
    losses = [line["loss"] for line in read_lines(RUN / "metrics.jsonl") if "loss" in line]
    print(f"training loss {losses[0]:.3f} at first, {sum(losses[-3:]) / 3:.3f} at last (mean of three lines)")
    probes = choose(options.probes)
    folders = {f"{SIZE} x {SIZE}": ROOT / "pictures", "as they are": DEMO / "data" / "test"}
    show(probes, ROOT / "pictures")
    said = {dtype: ours(probes, folders.values(), plugins, dtype) for dtype in ("fp32", options.precision)}
    for quant in options.quant:
        place, parity = convert(quant)
        compare(probes, list(folders), said, theirs(probes, folders.values(), plugins, place), quant)
        tell(parity, quant)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def compare(
    probes: Sequence[Probe], names: Sequence[str], said: dict[str, list[list[str]]], found: list[list[str]], quant: str
) -> None:
    """Both sides of every probe, then the counts."""
    for n, name in enumerate(names):
        print(f"\n{quant}, pictures {name}")
        for k, probe in enumerate(probes):
            mine = " / ".join(dict.fromkeys(answers[n][k] for answers in said.values()))
            print(f"  {probe.picture:9} {probe.question:42} ({probe.truth}) mmft: {mine:28} llama.cpp: {found[n][k]}")
        right = sum(text.endswith(f"| {probe.truth}") for text, probe in zip(found[n], probes, strict=True))
        for dtype, answers in said.items():
            same = sum(mine == other for mine, other in zip(answers[n], found[n], strict=True))
            print(f"  same as mmft chat in {dtype}: {same} of {len(probes)}; llama.cpp right about {right}")


def tell(parity: dict[str, Any], quant: str) -> None:
    """What the parity gate of the conversion measured on its own probes."""
    outcomes = parity["outcomes"]
    same, most = sum(one["same_answer"] for one in outcomes), max(one["relative"] for one in outcomes)
    print(f"  {quant}: gate: {same} of {len(outcomes)} same answers, logits differ by up to {most:.2g}")
    print(f"  {parity['note']}")


if __name__ == "__main__":
    main()
