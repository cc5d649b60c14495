"""The config of a run: five parts, typed, checked whole before a weight is read.

A config is a Python file that binds `config = TrainConfig(...)`, or the `config.json` of an earlier run.
"""

from mmft.config.load import override
from mmft.config.schema import (
    LLM,
    Data,
    Dataset,
    Evaluation,
    Lora,
    Model,
    Optim,
    Prompt,
    Runtime,
    TrainConfig,
    Use,
    Vision,
    use,
)

__all__ = [
    "LLM",
    "Data",
    "Dataset",
    "Evaluation",
    "Lora",
    "Model",
    "Optim",
    "Prompt",
    "Runtime",
    "TrainConfig",
    "Use",
    "Vision",
    "override",
    "use",
]
