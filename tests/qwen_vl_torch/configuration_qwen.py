"""Configuration of the PyTorch stand-in beside this file."""

from transformers import PretrainedConfig


class QWenConfig(PretrainedConfig):
    model_type = "qwen"
