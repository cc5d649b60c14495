"""How much memory `mmft convert merge` takes: the model and about one shard.

    python benchmarks/convert.py [--layers 24] [--shard 64MB] [--quantization nf4]

Makes a random Llama with an adapter on all its linear layers in a temporary folder, merges and writes it, and prints
the anonymous memory of the process (RssAnon: without the weight files it maps) at its peak in each stage, seen by a
thread that looks every 2 ms.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch


class Peak:
    """The most anonymous memory since the last reading, in MB."""

    def __init__(self) -> None:
        self._highest, self._ends = 0.0, False
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ends:
            self._highest = max(self._highest, now())
            time.sleep(0.002)

    def read(self) -> float:
        """The peak; the next begins here."""
        peak, self._highest = max(self._highest, now()), now()
        return peak


def now() -> float:
    """Anonymous memory of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def model(folder: Path, layers: int, width: int) -> None:
    """A random Llama in bf16."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mmft.testing import tiny_tokenizer

    tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 64, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make(root: Path, options: argparse.Namespace) -> None:
    """A model folder with an adapter, as training leaves it. In a process of its own, or its memory would be reused."""
    from mmft.config import LLM, Data, Dataset, Lora, Model, Optim, Runtime, TrainConfig, use
    from mmft.data.shape import describe_model
    from mmft.modeling.build import build_model
    from mmft.modeling.checkpoint import save_parts, write_manifest
    from mmft.plugins import load_plugins

    plugins = load_plugins()
    model(root / "llm", options.layers, options.width)
    llm = LLM(path=str(root / "llm"), lora=Lora(r=16), quantization=options.quantization)
    source = Dataset(source=use("json", path="x"), data_map="llava")
    config = TrainConfig(
        model=Model(llm=llm),
        data=Data(datasets=(source,), chat_template="chatml", max_length=9),
        optim=Optim(lr=1e-3),
        runtime=Runtime(output_dir=root / "run"),
    )
    shape, cpu = describe_model(config.model, plugins), torch.device("cpu")
    built = build_model(config.model, plugins, info=None, image_id=None, dtype=torch.bfloat16, device=cpu)
    save_parts(root / "final", built, shape.tokenizer.hf)
    write_manifest(root / "final", config, plugins, "bf16")


def main() -> None:
    """Make, merge, write, print."""
    from mmft.convert.merge import save_language_model
    from mmft.convert.parts import load_parts
    from mmft.plugins import load_plugins

    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--shard", default="64MB")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, options)
        return
    plugins, cpu = load_plugins(), torch.device("cpu")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder, more in ((root, []), (root / "small", ["--layers", "1", "--width", "64"])):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], *more, "--make", str(folder)], check=True)
        small = load_parts(root / "small" / "final", plugins, dtype=None, device=cpu)  # imports what merging needs
        save_language_model(small, root / "small" / "out", options.shard)
        del small
        peak = Peak()
        before = peak.read()
        parts = load_parts(root / "final", plugins, dtype=None, device=cpu)
        loading, merged = peak.read(), now()
        size = sum(p.numel() * p.element_size() for p in parts.llm.parameters()) / 1e6
        save_language_model(parts, root / "out", options.shard)
        writing = peak.read()
        shards = [path.stat().st_size / 1e6 for path in (root / "out").glob("*.safetensors")]
    print(f"model {size:.0f} MB, {len(shards)} shards of up to {max(shards):.0f} MB; trained in {options.quantization}")
    above = f"anonymous memory, above the {before:.0f} MB before"
    print(f"{above}: loading and merging {loading - before:.0f} MB at most,")
    print(f"{merged - before:.0f} MB after it, writing {writing - before:.0f} MB at most")
    print(f"peak above the model: {max(loading, writing) - before - size:.0f} MB")


if __name__ == "__main__":
    main()
