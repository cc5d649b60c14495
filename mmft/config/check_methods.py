"""What can be wrong with how a model is trained: adapters, new tokens, schedules. Part of `mmft.config.check`."""

import re
from collections.abc import Iterator

from mmft.config.schema import LLM, Lora, Optim, TrainConfig
from mmft.errors import Problem

IMAGE_TOKEN = "<image>"  # mmft.data.tokenize keeps it for pictures
WITH_FLOOR = ("cosine_with_min_lr", "warmup_stable_decay")


def method_problems(config: TrainConfig) -> Iterator[Problem]:
    """The problems of adapters, new tokens, schedules and rates of parts."""
    llm, vision = config.model.llm, config.model.vision
    if llm.lora:
        yield from _lora_problems("model.llm.lora", llm.lora, quantization=llm.quantization)
        if llm.adapter and llm.lora.init != "default":
            yield Problem("model.llm.lora.init", "an adapter to start from has its own start", "drop init or adapter")
        if config.runtime.device == "cpu" and (reason := impossible_on_cpu(llm)):
            yield Problem(*reason.split(": ", 1))
    if vision and vision.lora:
        yield from _lora_problems("model.vision.lora", vision.lora, quantization="none")
    yield from _token_problems(llm)
    yield from _schedule_problems(config.optim)
    if config.optim.projector_weight_decay is not None and not (vision and vision.projector_trainable):
        yield Problem("optim.projector_weight_decay", "there is no projector that trains", "drop it")
    if config.optim.vision_weight_decay is not None and not (vision and (vision.trainable or vision.lora)):
        yield Problem(
            "optim.vision_weight_decay", "the vision encoder does not train", "set model.vision.lora or drop it"
        )


def impossible_on_cpu(llm: LLM) -> str:
    """Why an adapter cannot be trained without a GPU; empty where it can.

    On a CPU peft 0.21.2 replaces an int8 weight at each DoRA forward, and bitsandbytes 0.50.2 then loses its scales:
    the second step fails.
    """
    if llm.lora and llm.lora.dora and llm.quantization == "int8":
        return "model.llm.lora.dora: DoRA on int8 weights needs a GPU; set quantization='nf4', or dora=False"
    return ""


def _lora_problems(where: str, lora: Lora, *, quantization: str) -> Iterator[Problem]:
    """peft computes these starts from the weights as numbers, or gives the adapter the dtype of the weights."""
    if lora.init not in ("default", "gaussian") and quantization != "none":
        yield Problem(
            f"{where}.init",
            f"{lora.init!r} needs weights that are not quantised, these are {quantization}",
            "set init='default' or 'gaussian', or model.llm.quantization='none'",
        )
    if lora.dora and lora.init.startswith(("pissa", "olora")):
        yield Problem(f"{where}.dora", f"DoRA and init={lora.init!r} do not go together", "drop one of them")
    if lora.init == "orthogonal" and lora.r % 2:
        yield Problem(f"{where}.r", f"init='orthogonal' needs an even rank, found {lora.r}", f"set {lora.r + 1}")
    if isinstance(lora.targets, str) and lora.targets != "all-linear":
        try:
            re.compile(lora.targets)
        except re.error as error:
            yield Problem(
                f"{where}.targets",
                f"{lora.targets!r} is no regular expression: {error}",
                "give one, 'all-linear', or a tuple of layer names",
            )


def _token_problems(llm: LLM) -> Iterator[Problem]:
    where = "model.llm.new_tokens"
    if not llm.new_tokens:
        return
    if not (llm.lora or llm.trainable):
        yield Problem(
            where, "new tokens of a frozen language model would never be learnt", "set model.llm.lora or .trainable"
        )
    for token in sorted({token for token in llm.new_tokens if llm.new_tokens.count(token) > 1}):
        yield Problem(where, f"{token!r} is given twice", "drop one")
    for token in llm.new_tokens:
        if not token or token != token.strip():
            yield Problem(where, f"{token!r} is empty or has spaces around it", "give the bare text of the token")
    if IMAGE_TOKEN in llm.new_tokens:
        yield Problem(where, f"{IMAGE_TOKEN!r} stands for pictures and is added where the model has images", "drop it")


def _schedule_problems(optim: Optim) -> Iterator[Problem]:
    if optim.min_lr_ratio is not None and optim.schedule not in WITH_FLOOR:
        allowed = " and ".join(WITH_FLOOR)
        yield Problem("optim.min_lr_ratio", f"{optim.schedule} has no floor", f"drop it; {allowed} have one")
    if optim.schedule == "cosine_with_min_lr" and optim.min_lr_ratio is None:
        yield Problem("optim.min_lr_ratio", "cosine_with_min_lr needs it", "give a share of the rate, such as 0.1")
    if optim.decay_ratio is not None and optim.schedule != "warmup_stable_decay":
        yield Problem("optim.decay_ratio", f"{optim.schedule} does not use it", "drop it; warmup_stable_decay does")
    if optim.schedule == "warmup_stable_decay" and optim.warmup_ratio + decay_share(optim) > 1:
        yield Problem(
            "optim.decay_ratio", f"warm-up ({optim.warmup_ratio:g}) and fall take more than the run", "lower one"
        )


def decay_share(optim: Optim) -> float:
    """The share of the steps that the fall of `warmup_stable_decay` takes."""
    return 0.1 if optim.decay_ratio is None else optim.decay_ratio
