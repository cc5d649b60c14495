"""What preparing text costs: ratios within one run, each contender in a process of its own.

    python benchmarks/data.py work_dirs/demo/llm                      (50,000 records)
    python benchmarks/data.py work_dirs/demo/llm --more 500000        (and peak memory at ten times as many)

tokenizer  encode_batch over the whole texts, rendered beforehand: nothing a framework does can cost less
floor      by hand: json lines, a format string, batch encode, masks from lengths, numpy arrays, rows filled in order
mmft       `prepare()`, from the jsonl file to the token store on disk, and best-fit packing
warm       `prepare()` again: the store is there

One thread is TOKENIZERS_PARALLELISM=false and one core; the last rows may use every core. Times are the contender's
work, without imports and loading the tokenizer; CPU seconds are of all its threads.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CHUNK, MAX_LENGTH = 1000, 2048
ROUNDS = 3  # of each figure the least is shown: other work on the machine only ever adds
ROWS = (("tokenizer", 1), ("floor", 1), ("mmft", 1), ("tokenizer", 0), ("floor", 0), ("mmft", 0), ("warm", 0))  # 0: all
WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you
were all her she there would their we him been has when who will no more if out so up said what its about than into them
can only other time new some could these two may first then do any like my now over such our man describe explain write
sentence following summary generate list python function number calculate story customer machine learning energy climate
history important different example because however, environment, technology. Additionally, therefore, people. system,
process. information results: quickly carefully 3.5 2021 USA Shakespeare
""".split()  # noqa: SIM905 - a list of 150 strings would take 150 lines


def make_records(path: Path, number: int) -> None:
    """Alpaca-like records: an instruction, an input in four of ten, and an answer; 60 to 300 tokens with its format."""
    draw = random.Random(0)
    words = lambda low, high: " ".join(draw.choices(WORDS, k=draw.randint(low, high)))  # noqa: E731
    with path.open("w", encoding="utf-8") as file:
        for _ in range(number):
            given = words(5, 60) if draw.random() < 0.4 else ""
            answer = ".\n".join(words(10, 60) for _ in range(draw.randint(1, 4)))
            record = {"instruction": words(6, 25) + "?", "input": given, "output": answer}
            file.write(json.dumps(record) + "\n")


def load_tokenizer(path: str) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def prompt_and_answer(record: dict[str, str]) -> tuple[str, str]:
    """ChatML by hand."""
    question = f"{record['instruction']}\n{record['input']}" if record["input"] else record["instruction"]
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{record['output']}<|im_end|>"


def run_tokenizer(model: str, path: Path, cache: Path) -> tuple[float, float, int]:
    """Only the encoding is timed."""
    core = load_tokenizer(model).backend_tokenizer
    with path.open(encoding="utf-8") as file:
        texts = ["".join(prompt_and_answer(json.loads(line))) for line in file]
    began, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(texts), CHUNK):
        encoded = core.encode_batch(texts[start : start + CHUNK], add_special_tokens=False)
        tokens += sum(map(len, encoded))
    return time.perf_counter() - began, time.process_time() - cpu, tokens


def run_floor(model: str, path: Path, cache: Path) -> tuple[float, float, int]:
    """A loop a person would write for this one format, with everything in memory."""
    core = load_tokenizer(model).backend_tokenizer
    newline = core.encode("\n", add_special_tokens=False).ids
    began, cpu = time.perf_counter(), time.process_time()
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    ids: list[Any] = []
    masks: list[Any] = []
    for start in range(0, len(records), CHUNK):
        texts = [text for record in records[start : start + CHUNK] for text in prompt_and_answer(record)]
        encoded = [one.ids for one in core.encode_batch(texts, add_special_tokens=False)]
        for prompt, answer in zip(encoded[::2], encoded[1::2], strict=True):
            whole = np.array(prompt + answer + newline, dtype=np.int32)
            if len(whole) <= MAX_LENGTH:
                ids.append(whole)
                masks.append(np.zeros(len(whole), np.bool_))
                masks[-1][len(prompt) : len(prompt) + len(answer)] = True
    rows, free = 0, 0
    for one in ids:
        rows, free = (rows, free - len(one)) if len(one) <= free else (rows + 1, MAX_LENGTH - len(one))
    total = len(np.concatenate(ids)) + 0 * len(np.concatenate(masks))
    return time.perf_counter() - began, time.process_time() - cpu, total


def run_mmft(model: str, path: Path, cache: Path) -> tuple[float, float, int]:
    """The whole preparation of a config, and its packing."""
    from mmft.config import Data, Dataset, use
    from mmft.data.dataset import prepare
    from mmft.data.pack import PackedStore
    from mmft.data.tokenize import Tokenizer
    from mmft.plugins import load_plugins

    plugins, tokenizer = load_plugins(), Tokenizer.for_model(load_tokenizer(model))
    dataset = Dataset(source=use("jsonl", path=str(path)), data_map="alpaca")
    data = Data(datasets=(dataset,), chat_template="chatml", max_length=MAX_LENGTH, packing=True)
    began, cpu = time.perf_counter(), time.process_time()
    store = prepare(data, plugins, tokenizer, cache)
    packed = PackedStore.of(store, MAX_LENGTH)
    packed.summary()
    return time.perf_counter() - began, time.process_time() - cpu, int(packed.lengths.sum())


CONTENDERS = {"tokenizer": run_tokenizer, "floor": run_floor, "mmft": run_mmft, "warm": run_mmft}


def contender(name: str, model: str, path: Path, cache: Path, *, cores: int) -> dict[str, float]:
    """Run one contender in its own process."""
    own = {"TOKENIZERS_PARALLELISM": "false" if cores == 1 else "true", "RAYON_NUM_THREADS": str(cores)}
    command = [sys.executable, __file__, model, "--only", name, str(path), str(cache), "--cores", str(cores)]
    done = subprocess.run(command, env={**os.environ, **own}, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(name: str, model: str, path: Path, cache: Path, cores: int) -> None:
    """What a contender's process does."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    wall, cpu, tokens = CONTENDERS[name](model, path, cache)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "tokens": tokens, "peak": peak}))


def main(model: str, number: int, more: int) -> None:
    """Print the table: each run is a process, the contenders in turn."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        make_records(path, number)
        time.sleep(2.1)  # a file written just now is hashed again on each start; a user's is older
        print(f"{number:,} records, {path.stat().st_size / 1e6:.0f} MB of jsonl, {cores} cores")
        print(
            f"{'':<22}{'CPU s':>8}{'wall s':>8}{'rec/CPU-s':>11}{'rec/s':>9}{'CPU/floor':>11}{'wall/floor':>12}"
            f"{'peak MB':>9}{'tokens':>13}"
        )
        best: dict[tuple[str, int], dict[str, float]] = {}
        for turn in range(ROUNDS):
            for name, used in ROWS:
                used = used or cores
                cache = Path(folder) / f"cache{used}-{turn}"
                got = contender(name, model, path, cache, cores=used)
                so_far = best.setdefault((name, used), got)
                best[name, used] = {key: min(so_far[key], value) for key, value in got.items()}
        floor, floors = best["floor", 1]["cpu"], best["floor", cores]["wall"]
        for (name, used), got in best.items():
            wall = floors if used == cores else best["floor", 1]["wall"]
            print(
                f"{f'{name}, {used} core(s)':<22}{got['cpu']:>8.2f}{got['wall']:>8.2f}{number / got['cpu']:>11,.0f}"
                f"{number / got['wall']:>9,.0f}{got['cpu'] / floor:>11.2f}{got['wall'] / wall:>12.2f}"
                f"{got['peak']:>9.0f}{int(got['tokens']):>13,}"
            )
        if more:
            make_records(path, more)
            got = contender("mmft", model, path, Path(folder) / "cache-more", cores=cores)
            print(f"mmft, {more:,} records: {got['wall']:.1f} s, peak {got['peak']:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a tokenizer")
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--more", type=int, default=0, help="also prepare this many, for the peak of memory")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        name, records, cache = arguments.only
        measure(name, arguments.model, Path(records), Path(cache), arguments.cores)
    else:
        main(arguments.model, arguments.records, arguments.more)
