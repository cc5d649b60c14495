"""transformers' Trainer with four things of ours: the data order, the parameter groups, saving, and loading.

Nothing outside `mmft/train/` imports Trainer.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from mmft.config import Optim, TrainConfig
from mmft.data.bad_samples import BadSamples
from mmft.data.feed import StreamFeed
from mmft.modeling.checkpoint import checkpoints, publish, save_parts
from mmft.modeling.llava import LlavaModel
from mmft.types import IGNORE_INDEX

SAVING = ".saving"


class MMTrainer(Trainer):  # type: ignore[misc]
    """One run. `sampler` or `feed` decides the order; `write_manifest` closes a checkpoint folder."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        sampler: torch.utils.data.Sampler[int] | None,
        hf_tokenizer: Any,
        write_manifest: Callable[[Path], None],
        feed: StreamFeed | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.config, self.sampler, self.feed, self.hf_tokenizer = config, sampler, feed, hf_tokenizer
        self.write_manifest = write_manifest
        self.seen_tokens = self.trained_tokens = self.seen_images = 0
        self.bad_samples = BadSamples(config.runtime.output_dir / "dropped.jsonl", config.data.max_bad_fraction)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """A stream brings its own loader, so that accelerate neither reads ahead nor deals out its rows again."""
        if self.feed is None:
            return super().get_train_dataloader()
        return self.feed.loader(
            self.data_collator, batch_size=self._train_batch_size, rank=self.args.process_index,
            world=self.args.world_size, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """The batches of one optimizer step; a stream notes that they are taken."""
        batches, items = super().get_batch_samples(*args, **options)
        if self.feed:
            for batch in batches:
                self.feed.take(batch)
        return batches, items

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As transformers', with the passes over a stream for its epoch."""
        if self.feed:
            self.state.epoch = float(self.feed.passes)
        super().log(logs, *args, **options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, or what `optim.optimizer` names, over our parameter groups."""
        existing: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if existing is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(self.model if model is None else model, self.config.optim)
            existing = self.optimizer = optimizer_class(groups, **options)
        return existing

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """As transformers', and count what is seen: padding is not."""
        self.bad_samples.take(inputs)
        items = options.get("num_items_in_batch")
        if items is not None:  # a step of nothing but bad samples has no label: a loss of 0, not 0 / 0
            options["num_items_in_batch"] = items.clamp(min=1) if isinstance(items, torch.Tensor) else max(1, items)
        mask = inputs.get("attention_mask")
        self.seen_tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        self.trained_tokens += int((inputs["labels"] != IGNORE_INDEX).sum())
        pictures = inputs.get("pixel_values", inputs.get("image_features"))
        self.seen_images += len(pictures) if pictures is not None else 0
        return super().compute_loss(model, inputs, *args, **options)

    def _get_output_dir(self, trial: Any) -> str:
        """Where `_save_checkpoint` writes: a place nothing is ever resumed from."""
        return str(Path(self.args.output_dir) / SAVING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write aside, sync, rename; then let go of what is older than `save_total_limit` asks for."""
        output_dir = Path(self.args.output_dir)
        aside = output_dir / SAVING / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(aside.parent, ignore_errors=True)
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            if self.feed:
                self.feed.save(aside)
            self.write_manifest(aside)
            publish(aside, output_dir / aside.name)
            shutil.rmtree(aside.parent, ignore_errors=True)
            for old in checkpoints(output_dir)[self.config.runtime.save_total_limit :]:
                shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Our model folder instead of a state dict."""
        save_parts(Path(output_dir or self.args.output_dir), self._unwrapped(), self.hf_tokenizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model was built from the checkpoint, strictly. transformers' own way loads what it can find."""

    def _unwrapped(self) -> LlavaModel:
        model: LlavaModel = self.accelerator.unwrap_model(self.model)
        return model


def learning_rates(optim: Optim) -> dict[str, float]:
    """The rate of each part: its own, else `lr`."""
    return {"llm": optim.lr, "projector": optim.projector_lr or optim.lr, "vision": optim.vision_lr or optim.lr}


def parameter_groups(model: Any, optim: Optim) -> list[dict[str, Any]]:
    """Each trained parameter in exactly one group: by part (its rate) and by decay (matrices only, as in LLaVA)."""
    rates = learning_rates(optim)
    groups: dict[tuple[str, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.removeprefix("module.").partition(".")[0]  # DistributedDataParallel puts "module." before
        groups.setdefault((part, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rates[part],
            "weight_decay": optim.weight_decay if decays else 0.0,
            "name": f"{part}{'' if decays else ', no decay'}",
        }
        for (part, decays), parameters in sorted(groups.items())
    ]


def training_arguments(config: TrainConfig, *, dtype: torch.dtype, device: torch.device) -> TrainingArguments:
    """Our optim and runtime parts in transformers' words."""
    optim, runtime = config.optim, config.runtime
    return TrainingArguments(
        output_dir=str(runtime.output_dir),
        seed=runtime.seed,
        data_seed=runtime.seed,
        per_device_train_batch_size=optim.batch_size_per_device,
        gradient_accumulation_steps=optim.accumulate,
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        lr_scheduler_type="cosine",
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        warmup_steps=optim.warmup_ratio,  # below 1 it is a share of the steps (transformers >= 5)
        optim=optim.optimizer,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=device.type == "cpu",
        logging_steps=runtime.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=runtime.save_steps,
        save_total_limit=None,  # we let go of old checkpoints ourselves, after the new one is complete
        report_to=[name for name in runtime.report_to if name != "tensorboard"] or "none",
        dataloader_num_workers=config.data.num_workers,
        dataloader_pin_memory=device.type == "cuda",
        dataloader_drop_last=False,
        remove_unused_columns=False,
        ignore_data_skip=config.data.streaming,  # a stream goes on from its own position
        disable_tqdm=True,
        label_names=["labels"],
    )
