"""LLaMA-Factory's own preparation of an alpaca file: what `data.py --peer-python` runs beside mmft.

    PEER/bin/python benchmarks/peer_llamafactory.py MODEL records.jsonl CACHE --max-length 2048 --cores 1 --workers 1

Needs a Python that has `llamafactory`, and nothing of mmft. Its `get_dataset` is called as its trainer calls it, with
`neat_packing` (packed, examples isolated) and its template `chatml`: load the file, align, render, encode, mask, pack,
write the arrow cache. Imports, arguments and loading the tokenizer are not timed; CPU seconds are of all threads and of
the worker processes. All else is as it is by default, TOKENIZERS_PARALLELISM too.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """Of this process's threads and of the children it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def arguments_of(model: str, records: Path, cache: Path, max_length: int, workers: int) -> dict[str, Any]:
    """The run's YAML, as a mapping."""
    cache.mkdir(parents=True, exist_ok=True)
    info = {"records": {"file_name": str(records.resolve())}}  # alpaca with its usual columns is the default
    (cache / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "model_name_or_path": model,
        "dataset": "records",
        "dataset_dir": str(cache),
        "template": "chatml",
        "cutoff_len": max_length,
        "packing": True,
        "neat_packing": True,
        "preprocessing_num_workers": workers or None,
        "output_dir": str(cache / "out"),
        "report_to": "none",
        "use_cpu": True,
    }


def prepare(given: dict[str, Any]) -> tuple[float, float, Any]:
    """Wall seconds, CPU seconds, and the packed rows."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model, data, training, _, _ = get_train_args(given)
    loaded = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(loaded["tokenizer"], data)
    began, cpu = time.perf_counter(), cpu_seconds()
    rows = get_dataset(template, model, data, training, stage="sft", **loaded)["train_dataset"]
    return time.perf_counter() - began, cpu_seconds() - cpu, rows


def count(rows: Any) -> dict[str, int]:
    """Packed rows, conversations in them, tokens without padding, and tokens with a label."""
    import numpy as np

    conversations, tokens, trained = 0, 0, 0
    for batch in rows.select_columns(["attention_mask", "labels"]).with_format("numpy").iter(batch_size=500):
        mask, labels = np.stack(batch["attention_mask"]), np.stack(batch["labels"])
        conversations += int(mask.max(axis=1).sum())  # numbered from 1 in each row
        tokens += int((mask > 0).sum())
        trained += int((labels >= 0).sum())
    return {"rows": len(rows), "conversations": conversations, "tokens": tokens, "trained": trained}


def main() -> None:
    """The last line of stdout is the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a tokenizer and a config.json")
    parser.add_argument("records", type=Path, help="jsonl with instruction, input, output")
    parser.add_argument("cache", type=Path, help="a folder of its own, empty")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="preprocessing_num_workers; 0: as it is by default")
    given = parser.parse_args()
    os.environ["HF_DATASETS_CACHE"] = str(given.cache / "datasets")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    sys.argv = sys.argv[:1]
    run = arguments_of(given.model, given.records, given.cache, given.max_length, given.workers)
    wall, cpu, rows = prepare(run)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    print(json.dumps({"wall": wall, "cpu": cpu, "peak": peak, **count(rows)}))


if __name__ == "__main__":
    main()
