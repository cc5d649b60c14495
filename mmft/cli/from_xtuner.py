"""What XTuner calls otherwise: its verbs and options that mmft has not under the same name, with what to do here.

`Commands` in `mmft.cli` looks here once nothing of ours and no plugin's has the name. XTuner's words are those of its
entry point and parsers at v0.1.23.
"""

EXTERNAL = "`mmft convert hf RUN OUT`, then"

VERBS = {
    "list-dataset-format": "here: `mmft data formats`",
    "log-dataset": "here: `mmft data show CONFIG`",
    "check-custom-dataset": "here: `mmft data check CONFIG`, or with a data file in place of CONFIG",
    "preprocess": "its arxiv and refcoco are not here; write the records in one of the formats of `mmft data formats` "
    "(arxiv and llava are among them)",
    "mmbench": f"there is no MMBench here; {EXTERNAL} VLMEvalKit or lmms-eval on OUT; exact match on your own "
    "questions: `mmft eval RUN FILE`",
    "eval-refcoco": f"there is no RefCOCO here; {EXTERNAL} lmms-eval on OUT; exact match on your own questions: "
    "`mmft eval RUN FILE`",
    "test": f"here: `mmft eval RUN FILE` for exact match; MMLU and other benchmarks: {EXTERNAL} lm-eval on OUT",
    "dist-train": "here: `mmft train CONFIG --nproc N`, one process a GPU",
    "help": "here: `mmft --help`",
    "version": "here: `mmft --version`",
}

PROCESSES = "leave it out: --nproc N starts N processes, one a GPU; under srun nothing is needed"
CFG_OPTIONS = "here: --set, once for each value, such as --set optim.lr=1e-5; `mmft show CONFIG` prints every path"


def _talking(verb: str) -> dict[str, str]:
    parts = (
        "here: `mmft convert import LLAVA OUT --for LLAVA/xtuner_config.py` once, for what pth_to_hf wrote; then "
        f"`mmft {verb} OUT`; or name the parts: --llm, --vision-encoder and --projector"
    )
    return {
        "--llava": parts,
        "--visual-encoder": parts,
        "--visual-select-layer": "here: --select-layer",
        "--torch-dtype": "here: --dtype bf16, fp16 or fp32",
        "--bot-name": "write the name into the text of --system",
        "--no-streamer": "leave it out; an answer is shown as it is written, or whole with --json",
        "--lagent": "here: --tools search, with the model's own form of calls",
        "--stop-words": "here: --stop, once for each text; those of the chat template hold anyway",
        "--offload-folder": "a model stays on one device here; --bits 4 or --bits 8 makes it smaller",
    }


# by the words of the command
OPTIONS = {
    "train": {
        "--cfg-options": CFG_OPTIONS,
        "--launcher": PROCESSES,
        "--local-rank": "leave it out; it is read from LOCAL_RANK",
        "--local_rank": "leave it out; it is read from LOCAL_RANK",
        "--gpu": "here: --nproc 8 for eight GPUs, one process each",
        "--gpus": "here: --nproc 8 for eight GPUs, one process each",
    },
    "chat": _talking("chat"),
    "web": _talking("web"),
    "convert pth_to_hf": {
        "--save-format": "leave it out, OUT is mmft's; for transformers: `mmft convert hf OUT OUT2`",
        "--safe-serialization": "leave it out; weights are always safetensors",
        "--fp32": "leave it out; OUT keeps what was trained; for transformers: `mmft convert hf OUT OUT2 --dtype fp32`",
        "--max-shard-size": "leave it out; `mmft convert merge OUT OUT2` and `mmft convert hf OUT OUT2` take it",
        "--cfg-options": "change the config itself; --set changes one of mmft's",
    },
    "convert merge": {"--safe-serialization": "leave it out; weights are always safetensors"},
    "list-cfg": {},
}


def verb_advice(verb: str) -> str:
    """What to do instead of a verb of XTuner's; an empty string for another word."""
    advice = VERBS.get(verb.lower().replace("_", "-"))
    return f"{verb} is XTuner's; {advice}" if advice else ""


def option_advice(command: str, option: str) -> str:
    """What to do instead of an option of XTuner's to a command, such as `convert merge`; else an empty string."""
    advice = OPTIONS.get(command, {}).get(option)
    return f"mmft {command} has no {option}; {advice}" if advice else ""
