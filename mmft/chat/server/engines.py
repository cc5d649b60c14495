"""Other programs that serve a model: which command starts them, and what they can be told.

`transformers serve` (5.23.0) is asked for by name only. On an exported LLaVA it reads data URLs and streams, but
`stop` ends the connection, a file of the server is read where a message names its path, a slow address in a message
holds up everybody, and `n`, `response_format` and `logprobs` are ignored; it has no key, no queue and no uploads.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from mmft.errors import ModelError
from mmft.modeling.checkpoint import MANIFEST

# Of each program, its names for our options.
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "transformers": {"host": "--host", "port": "--port", "dtype": "--dtype", "device": "--device"},
    "vllm": {
        "host": "--host", "port": "--port", "dtype": "--dtype", "name": "--served-model-name",
        "max_context": "--max-model-len", "api_key": "VLLM_API_KEY",
    },
}  # fmt: skip
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def command(engine: str, model: str | None, given: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """What to run in our place, and what to add to its environment; `given` are the options a user has set.

    Raises `ModelError` where the program is missing, has no such option, or cannot open the model.
    """
    if model is None:
        raise ModelError(f"--engine {engine} needs a MODEL: a folder or name that transformers opens")
    folder = Path(model)
    if any((path / MANIFEST).is_file() for path in (folder, folder / "final")):
        hint = f"mmft convert hf {model} OUT, then mmft serve OUT --engine {engine}"
        raise ModelError(f"--engine {engine}: {model} was written by mmft train, which {engine} does not open; {hint}")
    known = OPTIONS[engine]
    unknown = [name for name in given if name not in known]
    if unknown:
        option = f"--{unknown[0].replace('_', '-')}"
        raise ModelError(f"{option}: {engine} has no such option; leave it out, or serve with --engine mmft")
    arguments, environment = [*_program(engine, model), "serve", model], {}
    for name, value in {"host": "127.0.0.1", "port": 8000, **given}.items():
        if known[name].startswith("--"):
            arguments += [known[name], DTYPES.get(str(value), str(value))]
        else:  # a list of processes would show a key
            environment[known[name]] = str(value)
    return arguments, environment


def run(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Become the other program; does not return."""
    sys.stdout.flush()
    os.execvpe(arguments[0], list(arguments), {**os.environ, **environment})


def _program(engine: str, model: str) -> list[str]:
    if engine == "vllm":
        if program := shutil.which(
            "vllm", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        ):
            return [program]
        raise ModelError(f"vllm is not installed here; where it is: vllm serve {model}")
    missing = [name for name in ("fastapi", "uvicorn", "openai", "typer") if find_spec(name) is None]
    if missing:
        needs = f'transformers serve needs {", ".join(missing)}; run: pip install "transformers[serving]"'
        raise ModelError(needs)
    return [sys.executable, "-m", "transformers.cli.transformers"]
