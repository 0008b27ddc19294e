"""A checkpoint's folder on disk -> arrays -> a loaded model, and back.

Follow one through: ``files`` finds what to read, ``safetensors`` and ``torch_file`` (with ``pickles``) read it,
``reading`` puts the files together, ``quantized`` turns GPTQ, AWQ and FP8 into MLX's form, ``loading`` fills a model.
``writing`` streams tensors into safetensors shards.
"""

from qwenvl_mlx.checkpoint.loading import load_model
from qwenvl_mlx.checkpoint.reading import Source, Weights, open_checkpoint, read

__all__ = ["Source", "Weights", "load_model", "open_checkpoint", "read"]
