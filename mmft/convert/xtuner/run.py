"""Parts 4 and 5 of an XTuner config, optimizer, schedule and hooks, as our `Optim` and `Runtime`."""

from pathlib import PurePosixPath
from typing import Any

from mmft.convert.xtuner.model import ModelDraft
from mmft.convert.xtuner.names import BUILT_IN_HOOKS, OPTIMIZERS, TRACKERS
from mmft.convert.xtuner.report import Node, Report, last_name, shown
from mmft.convert.xtuner.write import Call, one_line, path_of

WARM_UPS = {"LinearLR", "ConstantLR"}
SCHEDULES = {"CosineAnnealingLR": "cosine", "PolyLR": "polynomial", "LinearLR": "linear", "ConstantLR": "constant"}
UNLIMITED = 1000  # checkpoints; XTuner's -1


def draft_optim(top: Node, batch_size: int, model: ModelDraft, report: Report) -> tuple[Call, int]:
    """The `Optim(...)` to write, and how many of XTuner's iterations are one optimizer step."""
    wrapper = top.node("optim_wrapper") or Node({}, "optim_wrapper", report)
    accumulate = int(wrapper.number("accumulative_counts", 1))
    optimizer = wrapper.node("optimizer") or Node({}, "optim_wrapper.optimizer", report)
    rate = optimizer.number("lr", 1e-4)
    betas = optimizer.take("betas", (0.9, 0.999))
    clip = wrapper.node("clip_grad")
    epochs, steps = _length(top, accumulate, report)
    schedule, warm_up, floor = _schedule(top, epochs, steps, accumulate, rate, report)
    name = OPTIMIZERS.get(optimizer.kind)
    if name is None:
        report.edit(f"optim_wrapper.optimizer: {optimizer.kind} has no counterpart; AdamW is written")
    call = Call(
        "Optim",
        lr=rate,
        **_rates(wrapper, rate, model, report),
        optimizer=name if name not in (None, "adamw_torch") else None,
        betas=tuple(betas) if tuple(betas) != (0.9, 0.999) else None,
        weight_decay=optimizer.take("weight_decay", 0) or None,
        max_grad_norm=_norm(clip, report),
        warmup_ratio=warm_up if warm_up != 0.03 else None,
        schedule=schedule if schedule != "cosine" else None,
        min_lr_ratio=floor,
        epochs=epochs,
        max_steps=steps,
        batch_size_per_device=batch_size,
        accumulate=accumulate,
    )
    optimizer.close(same=("eps", "fused", "foreach"))
    wrapper.close(same=("loss_scale", "dtype", "constructor", "use_fsdp"))
    return call, accumulate


def _norm(clip: Node | None, report: Report) -> float | None:
    if clip is None:
        return 0.0  # no clipping
    norm = clip.number("max_norm", 1)
    clip.close(same=("error_if_nonfinite", "norm_type"))
    return norm if norm != 1 else None


def _rates(wrapper: Node, rate: float, model: ModelDraft, report: Report) -> dict[str, float]:
    """`paramwise_cfg.custom_keys` that multiply the rate of the projector or the encoder."""
    paramwise = wrapper.node("paramwise_cfg")
    keys = paramwise.take("custom_keys", {}) if paramwise else {}
    rates = {}
    for key, value in keys.items():
        factor = value.get("lr_mult") if isinstance(value, dict) else None
        field = {"projector": "projector_lr", "visual_encoder": "vision_lr"}.get(str(key))
        applies = {"projector_lr": model.trains_projector, "vision_lr": model.trains_vision}.get(field or "", False)
        if field and applies and isinstance(factor, int | float):
            rates[field] = rate * factor
        else:
            where = f"{wrapper.where('paramwise_cfg')}.custom_keys.{key}"
            report.edit(f"{where}: only a projector and a visual_encoder that train have rates of their own")
    if paramwise:
        paramwise.close()
    return rates


def _length(top: Node, accumulate: int, report: Report) -> tuple[float | None, int | None]:
    """(epochs, optimizer steps): one of them is None."""
    loop = top.node("train_cfg") or Node({}, "train_cfg", report)
    epochs, iterations = loop.take("max_epochs"), loop.take("max_iters")
    loop.close(same=("by_epoch", "val_interval", "val_begin", "dynamic_intervals"))
    if iterations is not None:
        return None, _steps(int(iterations), accumulate)
    return epochs if isinstance(epochs, int | float) else 1, None


def _steps(iterations: int, accumulate: int) -> int:
    """MMEngine counts batches, mmft optimizer steps."""
    return max(1, round(iterations / accumulate))


def _schedule(
    top: Node, epochs: float | None, steps: int | None, accumulate: int, rate: float, report: Report
) -> tuple[str, float, float | None]:
    """(schedule, warm-up ratio, min_lr_ratio) of the list of schedulers."""
    parts = top.nodes("param_scheduler")
    whole = epochs if epochs is not None else (steps or 1) * accumulate
    warm_up, name, floor = 0.0, "constant", None
    for index, part in enumerate(parts):
        end = part.take("end")
        first = index == 0 and part.take("begin", 0) == 0
        if part.kind in WARM_UPS and first and isinstance(end, int | float) and end < whole:
            warm_up = round(end / whole, 6)
        elif part.kind in SCHEDULES:
            name = SCHEDULES[part.kind]
            floor = _floor(part, rate)
        else:
            report.edit(f"{part.path}: {part.kind} has no counterpart; optim.schedule lists the schedules")
        part.close(same=("by_epoch", "begin", "start_factor", "end_factor", "convert_to_iter_based", "T_max", "power"))
    if name == "constant" and warm_up:
        return "constant_with_warmup", warm_up, None
    if floor:
        if name == "cosine":
            return "cosine_with_min_lr", warm_up, floor
        report.differ(f"param_scheduler: {name} ends at 0 here, not at {floor:g} of the rate")
    return name, warm_up, None


def _floor(part: Node, rate: float) -> float | None:
    """The lowest rate as a share of the highest."""
    ratio, lowest = part.take("eta_min_ratio"), part.take("eta_min")
    if isinstance(ratio, int | float) and ratio:
        return float(ratio)
    return round(lowest / rate, 6) if isinstance(lowest, int | float) and lowest else None


def draft_runtime(top: Node, output_dir: str, model: ModelDraft, accumulate: int, report: Report) -> Call:
    """The `Runtime(...)` to write; XTuner's intervals in batches become optimizer steps."""
    work_dir = top.take("work_dir")
    seed = (top.node("randomness") or Node({}, "randomness", report)).take("seed")
    every, limit = _checkpoints(top, accumulate, report)
    sample_steps, samples = _hooks(top, model, accumulate, report)
    return Call(
        "Runtime",
        output_dir=path_of(work_dir if isinstance(work_dir, str) else output_dir),
        seed=seed if isinstance(seed, int) else None,
        precision=_precision(top, report),
        gradient_checkpointing=model.checkpointing or None,
        sequence_parallel=_sequence_parallel(top),
        save_steps=every,
        save_total_limit=limit,
        sample_steps=sample_steps,
        samples=samples or None,
        report_to=_trackers(top, report),
    )


def _precision(top: Node, report: Report) -> str | None:
    wrapper = top.values.get("optim_wrapper") or {}
    kind = last_name(wrapper.get("dtype"))
    if kind == "bfloat16":
        return "bf16"
    if kind == "float16":
        how = "bf16 where the GPU has it, as XTuner with --deepspeed"
        report.differ(f"optim_wrapper.dtype = float16: precision is left at auto ({how})")
        return None
    return "fp32" if last_name(wrapper.get("type")) == "OptimWrapper" else None


def _sequence_parallel(top: Node) -> int | None:
    size = top.take("sequence_parallel_size", 1)
    return size if isinstance(size, int) and size > 1 else None


def _checkpoints(top: Node, accumulate: int, report: Report) -> tuple[int | None, int | None]:
    hooks = top.node("default_hooks") or Node({}, "default_hooks", report)
    checkpoint = hooks.node("checkpoint") or Node({}, "default_hooks.checkpoint", report)
    logger = hooks.node("logger")
    every, limit = checkpoint.number("interval", -1), checkpoint.take("max_keep_ckpts", -1)
    if checkpoint.take("by_epoch", True) and every > 0:
        report.differ(f"{checkpoint.where('interval')} = {every} epochs: save_steps counts optimizer steps; 500 here")
        every = -1
    checkpoint.close(same=("save_last", "save_optimizer", "save_begin", "out_dir", "published_keys"))
    if logger is not None:
        logger.close(same=("log_metric_by_epoch", "interval", "ignore_last"))
    hooks.close(same=("timer", "param_scheduler", "sampler_seed", "runtime_info"))
    steps = _steps(int(every), accumulate) if every > 0 else None
    keep = limit if isinstance(limit, int) and limit > 0 else UNLIMITED if limit == -1 else None
    return steps, keep if keep != 2 else None


def _hooks(top: Node, model: ModelDraft, accumulate: int, report: Report) -> tuple[int | None, Any]:
    """What the custom hooks do that is not built in: the sample chats."""
    every, samples = None, None
    for hook in top.nodes("custom_hooks"):
        if hook.kind == "EvaluateChatHook":
            every, samples = _samples(hook, model, accumulate, report)
        elif hook.kind == "HFCheckpointHook":
            report.differ("HFCheckpointHook: after training, mmft convert hf writes that form")
        elif hook.kind not in BUILT_IN_HOOKS:
            kind = hook.kind or shown(hook.values)
            report.edit(f"{hook.path}: {kind} has no counterpart; write it as mmft_callbacks (docs/hooks.md)")
    return every, samples


def _samples(hook: Node, model: ModelDraft, accumulate: int, report: Report) -> tuple[int | None, Any]:
    every, texts = hook.take("every_n_iters"), hook.take("evaluation_inputs") or []
    texts = [texts] if isinstance(texts, str) else [text for text in texts if isinstance(text, str)]
    images = hook.take("evaluation_images")
    images = [images] if isinstance(images, str) else list(images or [])
    if hook.take("system"):
        report.lose(f"{hook.where('system')}: samples are asked without a system text")
    if hook.take("stop_words"):
        report.lose(f"{hook.where('stop_words')}: answers stop where the chat template says")
    if hook.take("max_new_tokens"):
        report.lose(f"{hook.where('max_new_tokens')}: samples have a length of their own")
    hook.close(same=("tokenizer", "image_processor", "prompt_template", "stop_word"))
    addresses = [str(image) for image in images if "://" in str(image)]
    pictures = tuple(path_of(PurePosixPath(str(image)).name if addresses else str(image)) for image in images) or None
    prompts = tuple(Call("Prompt", text=text, images=pictures) for text in texts)
    if addresses:
        asked = f", and in Runtime write sample_steps={_steps(int(every), accumulate)}" if texts and every else ""
        written = f"{asked}, samples={one_line(prompts)}" if asked else ""
        report.lose(
            f"{hook.where('evaluation_images')} = {shown(addresses[0])}: mmft opens no URL; save the picture{written}"
        )
        return None, None
    return (_steps(int(every), accumulate), prompts) if texts and every else (None, None)


def _trackers(top: Node, report: Report) -> Any:
    visualizer = top.node("visualizer")
    if visualizer is None:
        return None
    found = []
    for backend in visualizer.nodes("vis_backends"):
        if backend.kind in TRACKERS:
            found.append(TRACKERS[backend.kind])
        elif backend.kind != "LocalVisBackend":
            report.lose(f"{backend.path}: {backend.kind}; runtime.report_to lists what there is")
    return tuple(found) or None
