"""The programs that are compared: each loads a checkpoint and runs a case, and tells how long its parts took.

A program runs in a process of its own (``python -m benchmarks.programs NAME FOLDER DTYPE CLOCK``), which takes one
case a line on stdin and answers one line of JSON, so that several can be alive at once and be measured in turn.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from benchmarks import preprocess
from benchmarks.cases import Case, Inputs, inputs
from benchmarks.device import peak_bytes, reset_peak

if TYPE_CHECKING:  # imports are part of what loading takes
    from qwenvl_mlx.layers.cache import Cache
    from qwenvl_mlx.media import Embedded
    from qwenvl_mlx.models.base import VisionLanguageModel

Timings = dict[str, float]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class Program(Protocol):
    """One program under measurement; ``device`` says where it runs."""

    device: str

    def run(self, case: Case, given: Inputs) -> tuple[Timings, NDArray[np.float32]]:
        """Seconds of ``preprocess`` (where the program has its own), ``vision``, ``prefill`` (after vision), ``decode``
        (a token of every row); logits of the prompt's end.

        Where MLX counts them, ``vision bytes`` too: the most that the tower held beside weights and pixels.
        """


class Ours:
    """qwenvl-mlx itself."""

    def __init__(self, folder: str, dtype: str, clock: Clock) -> None:
        from qwenvl_mlx import load_model
        from qwenvl_mlx.engine.step import CompiledStep

        self.clock = clock
        self.model = load_model(folder, dtype=dtype)
        self.step = CompiledStep(self.model)
        self.config = _config(folder)
        self.device = str(mx.default_device())

    def run(self, case: Case, given: Inputs) -> tuple[Timings, NDArray[np.float32]]:
        from qwenvl_mlx import Media
        from qwenvl_mlx.engine.step import Decoding
        from qwenvl_mlx.engine.together import read_together

        model = self.model
        began = self.clock()
        if given.photo is not None:
            preprocess.ours(given.photo, self.config)
        media = [] if given.rows is None or given.grid is None else [Media("image", given.rows, given.grid)]
        start = self.clock()
        with _counted() as held:
            features = model.encode(media)
            mx.eval([(item.embeddings, item.deepstack) for item in features])
        seen = self.clock()
        ids, cache = given.ids.tolist(), model.make_cache()
        if case.batch == 1:
            logits = read(model, model.embed(ids, features, media), cache)
        else:
            empty = [model.make_cache() for _ in range(case.batch)]
            logits, cache = read_together(model, [ids] * case.batch, empty)
        token = _best(logits)
        mx.eval(token, logits, cache.arrays)
        first = self.clock()
        fast = case.batch == 1 and self.step.suits(cache)
        _decode(Decoding(self.step, cache) if fast else lambda t: model.decode(t, cache), token, case)
        end = self.clock()
        return _timings(start, seen, first, end, case, began) | held, _last(logits)


def read(model: VisionLanguageModel, embedded: Embedded, cache: Cache, most: int | None = None) -> mx.array:
    """Logits ``[1, 1, vocab]`` of a prompt's end, read in slices as the engine's, of so many tokens at most."""
    from qwenvl_mlx.engine import EngineOptions
    from qwenvl_mlx.engine.pace import Paces

    paces, begin = Paces(lambda: False, most or EngineOptions.prefill_chunk), 0
    while begin < len(embedded):
        end = begin + paces.next_tokens(len(embedded) - begin)
        logits = model(embedded.slice(begin, end), cache=cache, last_only=True)
        mx.eval(cache.arrays)
        begin = end
    return logits


class Torch:
    """transformers on PyTorch: MPS where there is one, else the CPU."""

    def __init__(self, folder: str, dtype: str, clock: Clock) -> None:
        import torch

        self.clock, self.torch, self.config = clock, torch, _config(folder)
        self.device = "mps" if torch.backends.mps.is_available() else "cpu"
        self.model: Any = self._load(folder, getattr(torch, dtype)).to(self.device).eval()

    def _load(self, folder: str, dtype: Any) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)

    def run(self, case: Case, given: Inputs) -> tuple[Timings, NDArray[np.float32]]:
        with self.torch.no_grad():
            ids = self.torch.from_numpy(given.ids).expand(case.batch, -1).to(self.device)
            began = self.clock()
            if given.photo is not None:
                preprocess.reference(given.photo, self.config)
            start = self.clock()
            features = None
            if given.rows is not None:
                rows = self.torch.from_numpy(given.rows).to(self.device, self.model.dtype)
                features = self._see(rows, given)
                self._wait()
            seen = self.clock()
            out = self._read(ids, features, given)
            self._wait()
            first = self.clock()
            logits = out.logits[0, -1].float().cpu().numpy()
            self._decode(out, case.new_tokens)
            end = self.clock()
        return _timings(start, seen, first, end, case, began), logits

    def _see(self, rows: Any, given: Inputs) -> Any:
        return self.model.model.visual(rows, grid_thw=self.torch.tensor([given.grid], device=self.device))

    def _read(self, ids: Any, features: Any, given: Inputs) -> Any:
        """The prompt, by a forward pass that knows what the vision tower would answer."""
        extra: dict[str, Any] = {}
        if given.rows is not None:
            extra = {"pixel_values": self.torch.from_numpy(given.rows).to(self.device, self.model.dtype)}
            extra["image_grid_thw"] = self.torch.tensor([given.grid], device=self.device)
            extra["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        tower = self.model.model.visual
        forward, tower.forward = tower.forward, lambda *_, **__: features
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **extra)
        tower.forward = forward
        return out

    def _decode(self, out: Any, steps: int) -> None:
        cache = out.past_key_values
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(steps):
            out = self.model(input_ids=token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            token = out.logits[:, -1:].argmax(-1)
            token.tolist()

    def _wait(self) -> None:
        if self.device == "mps":
            self.torch.mps.synchronize()


class Original(Torch):
    """The original Qwen-VL's own PyTorch code, which its folder must bring along: no package has it."""

    def _load(self, folder: str, dtype: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)

    def _see(self, rows: Any, given: Inputs) -> Any:
        return self.model.transformer.visual(rows[None])

    def _read(self, ids: Any, features: Any, given: Inputs) -> Any:
        # it would open the paths that stand in the slots
        self.model.transformer.visual.encode = lambda paths: features
        return self.model(input_ids=ids, use_cache=True)


class MlxVlm:
    """mlx-vlm, where it is installed."""

    def __init__(self, folder: str, dtype: str, clock: Clock) -> None:
        from mlx.utils import tree_map
        from mlx_vlm.utils import load_model

        self.clock = clock
        self.model: Any = load_model(Path(folder))
        cast = getattr(mx, dtype)
        self.model.update(
            tree_map(
                lambda p: p.astype(cast) if mx.issubdtype(p.dtype, mx.floating) else p,
                self.model.parameters(),
            )
        )
        mx.eval(self.model.parameters())
        self.device = str(mx.default_device())

    def run(self, case: Case, given: Inputs) -> tuple[Timings, NDArray[np.float32]]:
        from mlx_vlm.models.cache import make_prompt_cache

        model = self.model
        ids = mx.array([given.ids.tolist()] * case.batch)
        extra: dict[str, Any] = {}
        rows = features = None
        start = self.clock()
        with _counted() as held:
            if given.rows is not None and given.grid is not None:
                rows, grid = mx.array(given.rows), mx.array([given.grid])
                features = model.vision_tower(rows, grid)
                mx.eval(features)
                extra = {"image_grid_thw": grid}
        seen = self.clock()
        cache = make_prompt_cache(model.language_model)
        tower, model.vision_tower = model.vision_tower, _Known(model.vision_tower, features)
        embedded = model.get_input_embeddings(ids, rows, **extra)
        model.vision_tower = tower
        fields = {k: v for k, v in embedded.to_dict().items() if v is not None and k != "inputs_embeds"}

        def ahead(part: slice) -> mx.array:
            given_embeds = embedded.inputs_embeds[:, part]
            out = model.language_model(
                ids[:, part], inputs_embeds=given_embeds, cache=cache, **fields, **extra
            )
            return out.logits  # type: ignore[no-any-return]

        logits = _read_lazily(ahead, cache)
        token = _best(logits)
        mx.eval(token, logits)
        first = self.clock()
        _decode(lambda t: model.language_model(t, cache=cache).logits, token, case)
        end = self.clock()
        return _timings(start, seen, first, end, case) | held, _last(logits)


class _Known:
    """Stands in for a vision tower whose answer is known."""

    def __init__(self, tower: Any, features: Any) -> None:
        self.patch_embed, self.features = tower.patch_embed, features

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.features


class MlxLm:
    """mlx-lm, which runs the decoders alone."""

    def __init__(self, folder: str, dtype: str, clock: Clock) -> None:
        from mlx_lm.utils import load_model

        self.clock = clock
        self.model: Any = load_model(Path(folder))[0]
        self.model.set_dtype(getattr(mx, dtype))
        mx.eval(self.model.parameters())
        self.device = str(mx.default_device())

    def run(self, case: Case, given: Inputs) -> tuple[Timings, NDArray[np.float32]]:
        from mlx_lm.models.cache import make_prompt_cache

        model = self.model
        start = self.clock()
        cache = make_prompt_cache(model)
        ids = mx.array([given.ids.tolist()] * case.batch)
        logits = _read_lazily(lambda part: model(ids[:, part], cache=cache), cache)
        token = _best(logits)
        mx.eval(token, logits)
        first = self.clock()
        _decode(lambda t: model(t, cache=cache), token, case)
        return _timings(start, start, first, self.clock(), case), _last(logits)


def _read_lazily(ahead: Callable[[slice], mx.array], cache: Sequence[Any]) -> mx.array:
    """Logits of the last token, read as the generators of mlx-lm and mlx-vlm do: no others are ever computed."""
    ahead(slice(-1))
    mx.eval([layer.state for layer in cache])
    return ahead(slice(-1, None))


def _best(logits: mx.array) -> mx.array:
    """The next token of each row, ``[B, 1]``."""
    return mx.argmax(logits[:, -1:], axis=-1)


def _last(logits: mx.array) -> NDArray[np.float32]:
    """Of the first row's end."""
    return np.array(logits[0, -1].astype(mx.float32))


def _decode(step: Callable[[mx.array], mx.array], token: mx.array, case: Case) -> None:
    """Greedily; while a token is waited for, the next one is computed."""
    for _ in range(case.new_tokens):
        following = _best(step(token))
        mx.async_eval(following)
        mx.eval(token)
        token = following
    mx.eval(token)


def _torch(folder: str, dtype: str, clock: Clock) -> Program:
    return (Original if _config(folder)["model_type"] == "qwen" else Torch)(folder, dtype, clock)


def _config(folder: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
    return config


PROGRAMS: dict[str, Callable[[str, str, Clock], Program]] = {
    "qwenvl-mlx": Ours,
    "torch": _torch,
    "mlx-vlm": MlxVlm,
    "mlx-lm": MlxLm,
}
BLIND = ("mlx-lm",)  # programs without a vision tower


@contextlib.contextmanager
def _counted() -> Iterator[Timings]:
    """Fills in the bytes that MLX held at most, beyond those that it held before."""
    held: Timings = {}
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    yield held
    held["vision bytes"] = max(mx.get_peak_memory() - before, 0)


def _timings(
    start: float, seen: float, first: float, end: float, case: Case, began: float | None = None
) -> Timings:
    return {
        "preprocess": 0.0 if began is None or case.picture is None else start - began,
        "vision": 0.0 if case.picture is None else seen - start,
        "prefill": first - seen,
        "first token": first - start,
        "decode": (end - first) / case.new_tokens,
    }


def serve(name: str, folder: str, dtype: str, clock: str) -> None:
    """Load, say so, then answer one case a line until stdin ends."""
    tick = CLOCKS[clock]
    start = tick()
    program = PROGRAMS[name](folder, dtype, tick)
    loaded = {"load": tick() - start, "device": program.device, "peak": peak_bytes()}
    print(json.dumps(loaded), flush=True)
    config = _config(folder)
    for line in sys.stdin:
        order = json.loads(line)
        case = Case(
            **{**order["case"], "picture": order["case"]["picture"] and tuple(order["case"]["picture"])}
        )
        reset_peak()
        timings, logits = program.run(case, inputs(case, config))
        np.save(order["logits"], logits)
        print(json.dumps({**timings, "peak": peak_bytes()}), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:5])
