"""XTuner's names and ours: data maps, encoders, optimizers, hooks, and which of its settings say nothing new here."""

import re

# `dataset_map_fn` (its last name, less `_map_fn`) to a data map; those of the same name are not listed.
DATA_MAPS = {
    "crime_kg_assitant": "crime_kg",
    "crime_kg_assistant": "crime_kg",
    "openai": "openai",
    "stack_exchange": "stack_exchange",
}
ENCODERS = {  # class of transformers -> vision encoder
    "CLIPVisionModel": "clip",
    "SiglipVisionModel": "siglip",
    "Dinov2Model": "dinov2",
    "ViTModel": "vit",
}
OPTIMIZERS = {  # class -> a name of transformers' OptimizerNames
    "AdamW": "adamw_torch",
    "FusedAdam": "adamw_torch",
    "DeepSpeedCPUAdam": "adamw_torch",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW": "paged_adamw_32bit",
    "PagedAdamW32bit": "paged_adamw_32bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "Lion8bit": "lion_8bit",
    "PagedLion8bit": "paged_lion_8bit",
    "Adafactor": "adafactor",
    "SGD": "sgd",
}
TRACKERS = {"TensorboardVisBackend": "tensorboard", "WandbVisBackend": "wandb", "MLflowVisBackend": "mlflow"}
# mmft shows the first sample (`mmft data show`), measures speed and isolates packed samples without being told.
BUILT_IN_HOOKS = {
    "DatasetInfoHook",
    "ThroughputHook",
    "VarlenAttnArgsToMessageHubHook",
    "IterTimerHook",
    "ParamSchedulerHook",
    "DistSamplerSeedHook",
}
SHUFFLING_SAMPLERS = {"DefaultSampler", "SequenceParallelSampler", "RepeatSampler", "InfiniteSampler"}
OTHER_METHODS = {
    "DPO": "preference training (DPO)",
    "ORPO": "preference training (ORPO)",
    "RewardModel": "a reward model",
    "InternVL_V1_5": "InternVL with tiles of 448 pixels",
}
# Models that transformers builds itself: XTuner's trust_remote_code=True, which it writes everywhere, is not needed.
NATIVE = re.compile(
    r"(meta-llama|huggyllama|codellama|lmsys|mistralai|google|01-ai|HuggingFaceH4|bigcode|microsoft/Phi-3|CohereForAI"
    r"|deepseek-ai/deepseek-(coder|llm)|Qwen/Qwen(1\.5|2|3)|HuggingFaceTB|TinyLlama)"
)
_CLASSES = re.compile(r"patch-?(\d+)(?:-(\d+))?", re.IGNORECASE)
DEFAULT_PIXELS = 224  # of encoders whose name gives none: openai/clip-vit-large-patch14


def image_tokens(encoder: str) -> int | None:
    """Patches of one picture, by the encoder's name: 576 of `clip-vit-large-patch14-336`. None where it has none."""
    found = _CLASSES.search(encoder)
    if not found:
        return None
    pixels = int(found[2] or DEFAULT_PIXELS)
    return (pixels // int(found[1])) ** 2


def data_map(function: str) -> str:
    """The data map that goes by the name of a `dataset_map_fn`."""
    short = function.removesuffix("_map_fn")
    return DATA_MAPS.get(short, short)
