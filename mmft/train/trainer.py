"""transformers' Trainer with four things of ours: the data order, the parameter groups, saving, and loading.

Nothing outside `mmft/train/` imports Trainer.
"""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from mmft.config import Optim, TrainConfig
from mmft.config.check_methods import decay_share
from mmft.data.bad_samples import BadSamples
from mmft.data.collate import ORIGINS
from mmft.data.feed import StreamFeed
from mmft.errors import ConfigError, Problem
from mmft.modeling.checkpoint import checkpoints, gather_parts, or_nothing, publish, save_parts
from mmft.modeling.llava import LlavaModel
from mmft.train.engine import Engine, Fsdp
from mmft.train.guard import Guard
from mmft.train.progress import DatasetLoss, Pace, Progress
from mmft.train.validation import Validation, evaluate, is_over, kept_checkpoints, short_names
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
        engine: Engine,
        feed: StreamFeed | None = None,
        validation: Validation | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.engine = engine
        # transformers' word for a model that is sharded before the trainer gets it; it then leaves out DDP
        self.is_distributed_loading_by_transformers = isinstance(engine, Fsdp)
        self.config, self.sampler, self.feed, self.hf_tokenizer = config, sampler, feed, hf_tokenizer
        self.write_manifest = write_manifest
        self.validation, self.pace, self.screen = validation, Pace(), Progress()
        self.by_dataset = DatasetLoss(short_names(self.data_collator.datasets))
        self.guard = Guard(self._unwrapped(), config.runtime.output_dir, scaled=self.args.fp16)
        self.seen_tokens = self.trained_tokens = self.seen_images = 0
        self.bad_samples = BadSamples(config.runtime.output_dir / "dropped.jsonl", config.data.max_bad_fraction)

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        return self.sampler

    def get_train_dataloader(self) -> Any:
        """A stream brings its own loader, so that accelerate neither reads ahead nor deals out its rows again."""
        if self.engine.sequence > 1:
            return self._shared_rows()
        if self.feed is None:
            return super().get_train_dataloader()
        return self.feed.loader(
            self.data_collator, batch_size=self._train_batch_size, rank=self.args.process_index,
            world=self.args.world_size, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip

    def _shared_rows(self) -> Any:
        """The processes that share a row get the same ones."""
        from accelerate.data_loader import prepare_data_loader

        world, rank = (number // self.engine.sequence for number in (self.args.world_size, self.args.process_index))
        loader = torch.utils.data.DataLoader(
            self.train_dataset, self._train_batch_size, sampler=self.sampler, collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip
        return prepare_data_loader(loader, self.args.device, world, rank, put_on_device=True)

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """The batches of one optimizer step; a stream notes that they are taken."""
        batches, items = super().get_batch_samples(*args, **options)
        items = items // self.engine.sequence if items is not None else None  # those who share a row count it all
        if self.feed:
            for batch in batches:
                self.feed.take(batch)
        self.guard.begin(batches)
        return batches, items

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As transformers', with the passes over a stream for its epoch."""
        if self.feed:
            self.state.epoch = float(self.feed.passes)
        if "loss" in logs:
            counts = (self.seen_tokens, self.trained_tokens, self.seen_images)
            logs |= self.pace.measure(self.state.global_step, self.state.max_steps, counts, self._every_rank())
            logs |= self.by_dataset.means(self._every_rank())
        super().log(logs, *args, **options)
        if {"loss", "train_loss"} & logs.keys():  # these are told by every rank, at the same step
            (self.feed or self.bad_samples).share()

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """Nothing: the model is where it belongs, or its engine brings it there."""

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Not: gradients are reduced after every micro-batch, so that no rank ever holds all of them."""
        return nullcontext()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, or what `optim.optimizer` names, over our parameter groups."""
        existing: torch.optim.Optimizer | None = getattr(self, "optimizer", None)
        if existing is None:
            try:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
            except (ImportError, ValueError) as error:  # a package that this optimizer needs
                name, reason = self.config.optim.optimizer, str(error).strip().splitlines()[0]
                raise ConfigError([Problem("optim.optimizer", f"{name} cannot be used here: {reason}")]) from error
            model = self.model if model is None else model
            existing = self.optimizer = optimizer_class(parameter_groups(model, self.config.optim), **options)
            if options.get("optim_bits") == 8:
                keep_embeddings_in_32_bit(model)
        return existing

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' schedule, told what it needs to know of the run's length."""
        self.args.lr_scheduler_kwargs = schedule_options(self.config.optim, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """As transformers', and count what is seen: padding is not."""
        self.bad_samples.take(inputs)
        inputs.pop(ORIGINS, None)
        items = options.get("num_items_in_batch")
        if items is not None:  # a step of nothing but bad samples has no label: a loss of 0, not 0 / 0
            options["num_items_in_batch"] = items.clamp(min=1) if isinstance(items, torch.Tensor) else max(1, items)
        mask = inputs.get("attention_mask")
        if self.engine.counts_rows:
            self.seen_tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            self.trained_tokens += int((inputs["labels"] != IGNORE_INDEX).sum())
            pictures = inputs.get("pixel_values", inputs.get("image_features"))
            self.seen_images += len(pictures) if pictures is not None else 0
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        self.by_dataset.add(outputs)
        self.guard.saw(loss)
        if self.is_deepspeed_enabled and self.accelerator.sync_gradients:
            self.guard.check_losses(self.state.global_step + 1, self.engine.ranks.any, forward=self._unwrapped())
        return loss

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Our own, exact one: transformers' takes a mean of batch means."""
        assert self.validation is not None
        return evaluate(self.validation, self)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As transformers', and the last look before the optimizer steps."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        again = None if self.is_deepspeed_enabled else self._unwrapped()
        together = self.engine.sharded or self.engine.sequence > 1
        self.guard.check(norm, self.state.global_step + 1, forward=again, together=together)
        return norm

    def _every_rank(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Everybody's copy of a tensor, [ranks, ...]; None where there is one rank."""
        if self.args.world_size == 1:
            return None
        return lambda own: self.accelerator.gather(own.to(self.args.device)[None]).cpu()

    def _get_output_dir(self, trial: Any) -> str:
        """Where `_save_checkpoint` writes: a place nothing is ever resumed from."""
        return str(Path(self.args.output_dir) / SAVING)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write aside, sync, rename; then let go of what is older than `save_total_limit` asks for."""
        output_dir = Path(self.args.output_dir)
        aside = output_dir / SAVING / f"checkpoint-{self.state.global_step}"
        ranks = self.engine.ranks
        ranks.first_does(lambda: shutil.rmtree(aside.parent, ignore_errors=True))
        with self.pace.paused(), or_nothing(aside.parent, output_dir / aside.name):
            super()._save_checkpoint(model, trial)
            (self.feed or self.bad_samples).share()
            ranks.wait()  # every rank has written its share
            ranks.first_does(lambda: self._publish(aside, output_dir))

    def _publish(self, aside: Path, output_dir: Path) -> None:
        (self.feed or self.bad_samples).save(aside)
        self.engine.write(aside)
        self.write_manifest(aside)
        publish(aside, output_dir / aside.name)
        shutil.rmtree(aside.parent, ignore_errors=True)
        runtime, found = self.config.runtime, checkpoints(output_dir)
        kept = kept_checkpoints(found, runtime.save_total_limit, runtime.evaluation, self.state.log_history)
        for old in found:
            if old not in kept:
                shutil.rmtree(old)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Our model folder instead of a state dict; every rank comes here, the first one writes."""
        gathered = gather_parts(self._unwrapped(), self.engine.full, keep=self.args.should_save)
        if self.args.should_save:
            save_parts(Path(output_dir or self.args.output_dir), self._unwrapped(), self.hf_tokenizer, gathered)

    def stands_at_the_end_of(self, checkpoint: Path | None) -> bool:
        """Take over the state of a checkpoint after which nothing is left to train; False where there is more."""
        path = checkpoint / TRAINER_STATE_NAME if checkpoint else None
        state = TrainerState.load_from_json(str(path)) if path else None
        if state is None or not is_over(vars(state), self.config.runtime.evaluation):
            return False
        self.state = state
        return True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers', where the engine does not know better."""
        if not self.engine.saves_optimizer:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.engine.save_optimizer(self, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The weights were loaded when the model was built, strictly; here follow optimizer, schedule and scaler."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers', where the engine does not know better."""
        if checkpoint is None or not self.engine.saves_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.engine.load_optimizer(self, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model was built from the checkpoint, strictly. transformers' own way loads what it can find."""

    def _unwrapped(self) -> LlavaModel:
        model: LlavaModel = self.accelerator.unwrap_model(self.model)
        return model


def keep_embeddings_in_32_bit(model: torch.nn.Module) -> None:
    """Rare words have gradients of another size than frequent ones, which 8-bit blocks cannot hold together.

    As transformers' own `create_optimizer` does; bitsandbytes' paper: https://arxiv.org/abs/2110.02861, section 2.3.
    """
    from bitsandbytes.optim import GlobalOptimManager

    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})


def learning_rates(optim: Optim) -> dict[str, float]:
    """The rate of each part: its own, else `lr`."""
    return {"llm": optim.lr, "projector": optim.projector_lr or optim.lr, "vision": optim.vision_lr or optim.lr}


def weight_decays(optim: Optim) -> dict[str, float]:
    """The weight decay of each part: its own, else `weight_decay`."""
    own = {"llm": None, "projector": optim.projector_weight_decay, "vision": optim.vision_weight_decay}
    return {part: optim.weight_decay if decay is None else decay for part, decay in own.items()}


def schedule_options(optim: Optim, steps: int) -> dict[str, Any]:
    """What the schedule wants to know beside the warm-up, in transformers' words."""
    options: dict[str, dict[str, Any]] = {
        "cosine_with_min_lr": {"min_lr_rate": optim.min_lr_ratio},
        "warmup_stable_decay": {
            "num_decay_steps": round(decay_share(optim) * steps),
            "min_lr_ratio": optim.min_lr_ratio or 0.0,
            "decay_type": "linear",
        },
    }
    return options.get(optim.schedule, {})


def parameter_groups(model: Any, optim: Optim) -> list[dict[str, Any]]:
    """Each trained parameter in exactly one group: by part (its rate) and by decay (matrices only, as in LLaVA)."""
    rates, decay = learning_rates(optim), weight_decays(optim)
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
            "weight_decay": decay[part] if decays else 0.0,
            "name": f"{part}{'' if decays else ', no decay'}",
        }
        for (part, decays), parameters in sorted(groups.items())
    ]


def training_arguments(
    config: TrainConfig, *, dtype: torch.dtype, device: torch.device, **engine: Any
) -> TrainingArguments:
    """Our optim and runtime parts in transformers' words; `engine` holds its further arguments."""
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
        lr_scheduler_type=optim.schedule,
        neftune_noise_alpha=optim.neftune_alpha,
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
        report_to="none",  # `trackers.py` tells them
        dataloader_num_workers=config.data.num_workers,
        dataloader_pin_memory=device.type == "cuda",
        dataloader_drop_last=False,
        remove_unused_columns=False,
        ignore_data_skip=config.data.streaming,  # a stream goes on from its own position
        disable_tqdm=True,
        label_names=["labels"],
        **engine,
    )
