"""What preparing text costs: ratios within one run, each contender in a process of its own.

    python benchmarks/data.py work_dirs/demo/llm                      (50,000 records)
    python benchmarks/data.py work_dirs/demo/llm --more 500000        (and peak memory at ten times as many)
    python benchmarks/data.py work_dirs/demo/llm --peer-python PEER/bin/python      (and LLaMA-Factory beside them)
    python benchmarks/data.py work_dirs/demo/llm --readers      (what only reading a file costs)

tokenizer  encode_batch over the whole texts, rendered beforehand: nothing a framework does can cost less
floor      by hand: json lines, a format string, batch encode, masks from lengths, numpy arrays, rows filled in order
mmft       `prepare()`, from the jsonl file to the token store on disk, and best-fit packing
auto       the same with `chat_template="auto"`: the tokenizer's own jinja template, here ChatML
blocks     the same, of a jinja template that marks its answers with {% generation %}
warm       `prepare()` again: the store is there
peer       LLaMA-Factory's packed preparation of the same file, in its own Python (`peer_llamafactory.py`), one process
peers      the same with a process for each core (preprocessing_num_workers)

One thread is TOKENIZERS_PARALLELISM=false and one core, for the peer its own default and one core; the last rows may
use every core. Times are the contender's work, without imports and loading the tokenizer; CPU seconds are of all its
threads and processes.
"""

import argparse
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

CHUNK, MAX_LENGTH = 1000, 2048
ROUNDS = 3  # of each figure the least is shown: other work on the machine only ever adds
ROWS = (  # and cores, 0 for all
    *(("tokenizer", 1), ("floor", 1), ("mmft", 1), ("auto", 1), ("blocks", 1), ("peer", 1)),
    *(("tokenizer", 0), ("floor", 0), ("mmft", 0), ("warm", 0), ("peer", 0), ("peers", 0)),
)
BLOCKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Measured = dict[str, float]
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


def run_tokenizer(model: str, path: Path, cache: Path) -> Measured:
    """Only the encoding is timed."""
    core = load_tokenizer(model).backend_tokenizer
    with path.open(encoding="utf-8") as file:
        texts = ["".join(prompt_and_answer(json.loads(line))) for line in file]
    began, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for start in range(0, len(texts), CHUNK):
        encoded = core.encode_batch(texts[start : start + CHUNK], add_special_tokens=False)
        tokens += sum(map(len, encoded))
    return {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu, "tokens": tokens}


def run_floor(model: str, path: Path, cache: Path) -> Measured:
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
    tokens, loss = np.concatenate(ids), np.concatenate(masks)
    spent = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    return {**spent, "tokens": len(tokens), "trained": int(loss.sum()), "rows": rows + 1}


def run_mmft(model: str, path: Path, cache: Path, template: str = "chatml", jinja: str = "") -> Measured:
    """The whole preparation of a config, and its packing."""
    from mmft.config import Data, Dataset, use
    from mmft.data.dataset import prepare
    from mmft.data.pack import PackedStore
    from mmft.data.tokenize import Tokenizer
    from mmft.plugins import load_plugins

    plugins, tokenizer = load_plugins(), Tokenizer.for_model(load_tokenizer(model))
    tokenizer.hf.chat_template = jinja or tokenizer.hf.chat_template
    dataset = Dataset(source=use("jsonl", path=str(path)), data_map="alpaca")
    data = Data(datasets=(dataset,), chat_template=template, max_length=MAX_LENGTH, packing=True)
    began, cpu = time.perf_counter(), time.process_time()
    store = prepare(data, plugins, tokenizer, cache)
    packed = PackedStore.of(store, MAX_LENGTH)
    packed.summary()
    spent = {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    return {**spent, "tokens": int(packed.lengths.sum()), "trained": store.num_trained, "rows": len(packed)}


def run_auto(model: str, path: Path, cache: Path) -> Measured:
    """ChatML as a tokenizer brings it."""
    from mmft.testing import CHATML

    return run_mmft(model, path, cache, "auto", CHATML)


def run_blocks(model: str, path: Path, cache: Path) -> Measured:
    """ChatML as a tokenizer brings it for training."""
    return run_mmft(model, path, cache, "auto", BLOCKS)


def run_reader(name: str, path: Path) -> Measured:
    """Every record is read once; `jsonl` and `json` are mmft's sources, of the lines and of the same as one list."""
    from mmft_plugins.sources import load_json, load_jsonl

    listed = path.with_suffix(".json")
    began, cpu = time.perf_counter(), time.process_time()
    if name == "ijson":
        import ijson

        with listed.open("rb") as file:
            number = sum(1 for _ in ijson.items(file, "item", use_float=True, buf_size=1 << 20))
    elif name == "json.load":
        with listed.open(encoding="utf-8") as text:
            number = len(json.load(text))
    else:
        number = sum(1 for _ in (load_jsonl(path) if name == "jsonl" else load_json(listed)))
    return {"wall": time.perf_counter() - began, "cpu": time.process_time() - cpu, "records": number}


READERS = {name: partial(run_reader, name) for name in ("json", "jsonl", "json.load", "ijson")}
CONTENDERS = {
    "tokenizer": run_tokenizer,
    "floor": run_floor,
    "mmft": run_mmft,
    "warm": run_mmft,
    "auto": run_auto,
    "blocks": run_blocks,
}


def contender(name: str, model: str, path: Path, cache: Path, *, cores: int, peer: str = "") -> Measured:
    """Run one contender in its own process."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": str(cores > 1).lower(), "RAYON_NUM_THREADS": str(cores)}
    own = cache if name in ("mmft", "warm") else cache.with_name(f"{cache.name}-{name}")
    command = [sys.executable, __file__, model, "--only", name, str(path), str(own), "--cores", str(cores)]
    if name in ("peer", "peers"):
        environment = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
        script = str(Path(__file__).with_name("peer_llamafactory.py"))
        command = [peer, script, model, str(path), str(own), "--max-length", str(MAX_LENGTH)]
        command += ["--cores", str(cores), "--workers", str(cores if name == "peers" else 1)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    measured: Measured = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(name: str, model: str, path: Path, cache: Path, cores: int) -> None:
    """What a contender's process does."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    measured = READERS[name](path) if name in READERS else CONTENDERS[name](model, path, cache)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**measured, "peak": peak}))


def show(best: dict[tuple[str, int], Measured], number: int) -> None:
    """The table, and what the issue asks for: mmft against the peer."""
    cores = max(used for _, used in best)
    print(
        f"{'':<22}{'CPU s':>8}{'wall s':>8}{'rec/CPU-s':>11}{'rec/s':>9}{'CPU/floor':>11}{'wall/floor':>12}"
        f"{'peak MB':>9}{'tokens':>13}{'trained':>13}{'rows':>8}"
    )
    floor = best["floor", 1]["cpu"]
    for (name, used), got in best.items():
        cpu, wall, of_floor = got["cpu"], got["wall"], got["wall"] / best["floor", used]["wall"]
        tokens, trained, rows = (int(got.get(key, 0)) for key in ("tokens", "trained", "rows"))
        print(
            f"{f'{name}, {used} core(s)':<22}{cpu:>8.2f}{wall:>8.2f}{number / cpu:>11,.0f}{number / wall:>9,.0f}"
            f"{cpu / floor:>11.2f}{of_floor:>12.2f}{got['peak']:>9.0f}{tokens:>13,}{trained:>13,}{rows:>8,}"
        )
    if ("peer", 1) in best:
        cpu, wall, by_core = best["peer", 1]["cpu"], best["peer", cores]["wall"], best["peers", cores]["wall"]
        mmft, ours = best["mmft", 1]["cpu"], best["mmft", cores]["wall"]
        print(f"mmft against the peer: {cpu / mmft:.2f} times the records a CPU second (one core),", end=" ")
        print(f"{wall / ours:.2f} times by the clock ({by_core / ours:.2f} times its {cores} processes)")


def show_readers(model: str, number: int, rounds: int) -> None:
    """What reading one file costs, on one core, beside `json`; ijson (https://github.com/ICRAR/ijson) if installed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        make_records(path, number)
        with path.open(encoding="utf-8") as lines, path.with_suffix(".json").open("w", encoding="utf-8") as listed:
            listed.writelines(f"{', ' if row else '['}{line}" for row, line in enumerate(lines))
            listed.write("]")
        names = [name for name in READERS if name != "ijson" or importlib.util.find_spec("ijson")]
        runs = [{name: contender(name, model, path, path, cores=1) for name in names} for _ in range(rounds)]
        best = {name: {key: min(run[name][key] for run in runs) for key in runs[0][name]} for name in names}
        assert {got["records"] for got in best.values()} == {number}
        for name, got in best.items():
            times, peak = got["cpu"] / best["json"]["cpu"], got["peak"]
            print(f"{name:<10}{got['cpu']:>8.2f} CPU s{times:>8.2f} times json{peak:>8.0f} MB at most")


def main(model: str, number: int, more: int, peer: str, rounds: int) -> None:
    """Print the table: each run is a process, the contenders in turn."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        make_records(path, number)
        time.sleep(2.1)  # a file written just now is hashed again on each start; a user's is older
        print(f"{number:,} records, {path.stat().st_size / 1e6:.0f} MB of jsonl, {cores} cores")
        best: dict[tuple[str, int], Measured] = {}
        for turn in range(rounds):
            for name, used in ROWS:
                used = used or cores
                if name in ("peer", "peers") and not peer:
                    continue
                got = contender(name, model, path, Path(folder) / f"cache{used}-{turn}", cores=used, peer=peer)
                so_far = best.setdefault((name, used), got)
                best[name, used] = {key: min(so_far[key], value) for key, value in got.items()}
        show(best, number)
        if more:
            make_records(path, more)
            got = contender("mmft", model, path, Path(folder) / "cache-more", cores=cores)
            print(f"mmft, {more:,} records: {got['wall']:.1f} s, peak {got['peak']:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a tokenizer")
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--more", type=int, default=0, help="also prepare this many, for the peak of memory")
    parser.add_argument("--peer-python", default="", help="a Python that has llamafactory, to run it beside mmft")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--readers", action="store_true", help="measure only the reading of a file")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        name, records, cache = arguments.only
        measure(name, arguments.model, Path(records), Path(cache), arguments.cores)
    elif arguments.readers:
        show_readers(arguments.model, arguments.records, arguments.rounds)
    else:
        main(arguments.model, arguments.records, arguments.more, arguments.peer_python, arguments.rounds)
