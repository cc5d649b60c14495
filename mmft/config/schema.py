"""The five parts of a config, as frozen models: an unknown field is an error, a value has one home.

Core concepts are classes; what a plugin offers is `use("name", **options)`, plain data that dumps, compares and can be
overridden. Defaults are those of the papers or the reference code named beside them.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_serializer,
    model_validator,
)

Share = Annotated[float, Field(ge=0, lt=1)]
Schedule = Literal[  # names of transformers' SchedulerType
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]


class Part(BaseModel):
    """Base of all parts: frozen, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Use(Part):
    """A plugin's thing by name, with its options. Written `{"use": name, **options}` in JSON."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "use" in value:
            value = {"name": value["use"], "options": {k: v for k, v in value.items() if k != "use"}}
        if isinstance(value, dict) and isinstance(value.get("options"), dict):
            return {**value, "options": {k: _plain(v) for k, v in value["options"].items()}}  # as a dumped one has them
        return value

    @model_serializer
    def _to_flat(self) -> dict[str, Any]:
        return {"use": self.name, **{key: _plain(option) for key, option in self.options.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def use(name: str, /, **options: Any) -> Use:
    """Choose what a plugin offers under a name: `use("clip", path="openai/clip-vit-large-patch14-336")`."""
    return Use(name=name, options=options)


class Lora(Part):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685), built by peft.

    `targets="all-linear"` means every linear layer of the part it is given to, except the output head (QLoRA,
    https://arxiv.org/abs/2305.14314, section 4); a tuple names layers by their last name; any other string is a regular
    expression that the whole name of a layer must match, such as `.*layers\\.\\d+\\.self_attn\\.[qv]_proj`.
    """

    r: PositiveInt = 64
    alpha: PositiveFloat = 16.0
    dropout: Share = 0.05
    targets: str | tuple[str, ...] = "all-linear"
    dora: bool = False  # magnitude and direction apart (https://arxiv.org/abs/2402.09353)
    rslora: bool = False  # scale by alpha / sqrt(r) (https://arxiv.org/abs/2312.03732)
    init: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"] = "default"


class LLM(Part):
    """The language model. Frozen unless `trainable` (every weight) or `lora` (the adapter) says otherwise."""

    path: str
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    lora: Lora | None = None
    adapter: Path | None = None  # start from this PEFT adapter (an earlier run's `llm_adapter` folder)
    trainable: bool = False
    attention: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2"] = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    new_tokens: tuple[str, ...] = ()  # each becomes one token of its own, in data too; starts at the mean embedding


class Vision(Part):
    """The vision encoder and the projector. The encoder is frozen, the projector trained, unless said otherwise."""

    encoder: Use
    projector: Use
    projector_weights: Path | None = None  # a projector.safetensors, or a model folder that has one
    projector_trainable: bool = True
    lora: Lora | None = None
    adapter: Path | None = None  # start from this PEFT adapter (an earlier run's `vision_adapter` folder)
    trainable: bool = False
    feature_cache: Path | None = None  # keep the frozen encoder's features in this folder


class Model(Part):
    """Part 2: what is built. Without `vision` it is a text model."""

    llm: LLM
    vision: Vision | None = None
    hub: Literal["huggingface", "modelscope"] = "huggingface"  # where names of models are looked up


class Dataset(Part):
    """One source, read by one data map. `image_folder` is where its image paths start and may not lead out of."""

    source: Use
    data_map: str
    image_folder: Path | None = None
    system: str | None = None  # system text for conversations that have none
    system_text: str | None = None  # the same by name, from a plugin
    repeat: PositiveFloat = 1.0  # times an epoch; a fraction takes another random part each epoch
    weight: PositiveFloat | None = None  # share of an epoch, relative to the other datasets' (all have one, or none)
    limit: PositiveInt | None = None  # records: take only the first so many


class Data(Part):
    """Part 3: what is trained on."""

    datasets: tuple[Dataset, ...] = Field(min_length=1)
    validation: tuple[Dataset, ...] = ()  # what runtime.evaluation measures the loss of; never trained on
    validation_share: Share = 0.0  # instead: this share of each dataset's records is held out
    chat_template: str = "auto"
    allow_template_difference: bool = False  # train although the template's ids are not those of the model's own
    max_length: PositiveInt  # tokens, image tokens included
    too_long: Literal["drop", "truncate", "split", "error"] = "drop"
    packing: bool = False  # whole samples share a row of max_length; they do not see each other
    streaming: bool = False  # read while training, keep nothing; needs optim.max_steps
    group_by_modality: bool = False  # batches of images or of text, as LLaVA's group_by_modality_length
    group_by_length: bool = False
    on_bad_sample: Literal["error", "drop", "replace"] = "drop"  # what happens to a record that cannot be trained
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  # more dropped records than this stop the run
    num_workers: NonNegativeInt = 0  # DataLoader processes that open images


class Optim(Part):
    """Part 4: how it is trained. AdamW, warm-up over `warmup_ratio` of the steps, then cosine to 0 (LLaVA-1.5).

    What a part has no value of its own for, it takes from the general one (`projector_lr` from `lr`).
    """

    lr: PositiveFloat
    projector_lr: PositiveFloat | None = None
    vision_lr: PositiveFloat | None = None
    optimizer: str = "adamw_torch"  # a name of transformers' OptimizerNames, e.g. paged_adamw_8bit
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    projector_weight_decay: NonNegativeFloat | None = None
    vision_weight_decay: NonNegativeFloat | None = None
    max_grad_norm: NonNegativeFloat = 1.0
    warmup_ratio: Share = 0.03
    schedule: Schedule = "cosine"
    min_lr_ratio: Share | None = None  # of each rate, at the end; for the schedules that have a floor
    decay_ratio: Share | None = None  # share of the steps that the fall of warmup_stable_decay takes
    neftune_alpha: PositiveFloat | None = None  # noise on word embeddings (https://arxiv.org/abs/2310.05914)
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None  # optimizer steps; ends the run before its epochs do
    batch_size_per_device: PositiveInt = 1
    accumulate: PositiveInt = 1


class Prompt(Part):
    """What the model is asked during training, so that a person can watch it learn."""

    text: str
    images: tuple[Path, ...] = ()


class Evaluation(Part):
    """How often the loss of the validation data is measured, and what follows from it."""

    steps: PositiveInt = 500  # it is measured at the last step in any case
    keep_best: bool = True  # a new best is saved at once, and save_total_limit never deletes it
    final: Literal["last", "best"] = "last"  # whose weights final/ holds
    patience: PositiveInt | None = None  # stop after so many evaluations in a row without a new best


class Runtime(Part):
    """Part 5: where it runs and what it leaves behind."""

    output_dir: Path
    cache_dir: Path | None = None  # token stores; default: output_dir/../.cache
    seed: NonNegativeInt = 42
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    gradient_checkpointing: bool = False
    deepspeed: str | None = None  # zero1, zero2, zero2_offload, zero3, zero3_offload, or a DeepSpeed JSON file
    sequence_parallel: PositiveInt = 1  # processes that share each row, for long contexts
    fsdp: bool = False  # FSDP2: every rank holds a share of all weights, gradients and optimizer state
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt = 2
    logging_steps: PositiveInt = 10
    evaluation: Evaluation | None = None
    sample_steps: PositiveInt | None = None
    samples: tuple[Prompt, ...] = ()
    report_to: tuple[Literal["tensorboard", "wandb", "swanlab", "mlflow"], ...] = ()


class TrainConfig(Part):
    """A whole run. Stages are two configs joined by a path, not a flag."""

    model: Model
    data: Data
    optim: Optim
    runtime: Runtime
