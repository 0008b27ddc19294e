"""What the engine saves and how fairly it shares: ratios of one run, on random weights.

python -m benchmarks.engine                        # all four, qwen2.5-vl-250m
python -m benchmarks.engine --only second growth --requests 1000
python -m benchmarks.engine --only batch --cpu-time

second   time to the first token of a second question about the same 1344x1008 picture, against the first question
batch    tokens a second of eight greedy answers at once, against one, the reading of prompts included
gap      the longest pause of a running answer while another request reads 4,000 tokens, or encodes that picture
growth   memory over many mixed requests: pictures, cancellations, failures; answers compared with those given alone
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.device import describe
from benchmarks.synthetic import shape
from qwenvl_mlx.engine import Engine, EngineOptions, GenerationOptions, Reply, Request, TextEvent
from qwenvl_mlx.errors import PromptError, QwenVLError
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.models import model_class
from qwenvl_mlx.processor.base import Box, GenerationDefaults, MediaOptions, Message, Processor

GRID = (1, 72, 96)  # 1344 x 1008 pixels in patches of 14
QUESTION, ANSWER = 40, 128
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": 32000,
}
SMALL_VISION = {
    "depth": 4,
    "hidden_size": 80,
    "intermediate_size": 160,
    "num_heads": 2,
    "out_hidden_size": 64,
}


class Letters(Processor):
    """A letter for every token: the engine needs some text."""

    def __init__(self) -> None:
        self.tokenizer = self  # type: ignore[assignment]
        self.defaults = GenerationDefaults()

    def add(self, token: int) -> str:
        return chr(97 + token % 26)

    def finish(self) -> str:
        return ""

    def id(self, token: str) -> int | None:
        return None

    def detokenizer(self, *, skip_special: bool = True) -> Letters:
        return self

    def __call__(self, messages: Sequence[Message], **_: Any) -> Prompt:
        raise PromptError("ready prompts only")

    def raw(
        self,
        text: str,
        media: Sequence[Mapping[str, Any] | Media] = (),
        *,
        options: MediaOptions | None = None,
    ) -> Prompt:
        raise PromptError("ready prompts only")

    def boxes(self, text: str, prompt: Prompt) -> list[Box]:
        return []


class Bench:
    """A model with random weights, and prompts for it."""

    def __init__(self, config: dict[str, Any]) -> None:
        mx.random.seed(0)
        self.config = config
        self.model = model_class(config)(config)
        self.model.prepare()
        mx.eval(self.model)
        self.chance = np.random.default_rng(0)

    def engine(self, **options: Any) -> Engine:
        return Engine(self.model, Letters(), EngineOptions(**options))

    def words(self, count: int) -> list[int]:
        return self.chance.integers(10, 30000, count).tolist()  # type: ignore[no-any-return]

    def picture(self, grid: tuple[int, int, int] = GRID) -> Media:
        side = self.config["vision_config"]["patch_size"]
        rows = self.chance.standard_normal((grid[0] * grid[1] * grid[2], 3 * 2 * side * side))
        return Media("image", rows.astype(np.float32), grid)

    def question(self, picture: Media | None, words: int = QUESTION) -> Prompt:
        if picture is None:
            return Prompt(self.words(words))
        slots = [self.config["image_token_id"]] * (picture.grid[1] * picture.grid[2] // 4)
        return Prompt([*self.words(4), *slots, *self.words(words)], [picture])

    def second(self) -> dict[str, Any]:
        options = GenerationOptions(max_tokens=2, ignore_eos=True)
        cold, warm = [], []
        with self.engine() as engine:
            engine.generate(self.question(None), options)  # compiles kernels
            for _ in range(2):
                first = self.question(self.picture())
                cold.append(engine.generate(first, options).timings.ttft)
                for _ in range(3):
                    again = Prompt([*first.input_ids[:-QUESTION], *self.words(QUESTION)], first.media)
                    reply = engine.generate(again, options)
                    warm.append(reply.timings.ttft)
        first_token, second_token = statistics.median(cold), statistics.median(warm)
        return {
            "cold_s": first_token,
            "second_s": second_token,
            "ratio": first_token / second_token,
            "cached_tokens": reply.usage.cached_tokens,
        }

    def batch(self) -> dict[str, Any]:
        options = GenerationOptions(max_tokens=ANSWER, ignore_eos=True)
        prompts = [self.question(None) for _ in range(8)]
        with self.engine(cache_bytes=0, prompt_lookup=False) as engine:
            engine.generate(prompts[0], options)
            alone = [engine.generate(prompt, options) for prompt in prompts]
            requests = [engine.submit(prompt, options) for prompt in prompts]
            together = [request.result() for request in requests]
        one = statistics.median(
            len(reply.tokens) / (reply.timings.ttft + reply.timings.decode) for reply in alone
        )
        begin = min(request.submitted for request in requests)
        end = max(_end(request, reply) for request, reply in zip(requests, together, strict=True))
        eight = sum(len(reply.tokens) for reply in together) / (end - begin)
        same = [a.tokens == b.tokens for a, b in zip(alone, together, strict=True)]
        return {"one": one, "eight": eight, "ratio": eight / one, "identical": all(same)}

    def gap(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, prompt in (
            ("text_4000", self.question(None, 4000)),
            ("picture", self.question(self.picture())),
        ):
            found[name] = self._gap(prompt)
        return found

    def _gap(self, other: Prompt) -> dict[str, float]:
        options = GenerationOptions(max_tokens=4000, ignore_eos=True)
        with self.engine(cache_bytes=0, prompt_lookup=False) as engine:
            running = engine.submit(self.question(None), options)
            events = iter(running)
            quiet = _pauses(events, 20)
            slices = _Slices(engine)
            request = engine.submit(other, GenerationOptions(max_tokens=1, ignore_eos=True))
            busy = []
            while request.submitted and not slices.idle:
                busy += _pauses(events, 1)
            running.cancel()
            request.cancel()
        step, longest = statistics.median(quiet), max(busy)
        return {
            "step_s": step,
            "slice_s": slices.longest,
            "gap_s": longest,
            "steps_beyond_slice": (longest - slices.longest) / step,
        }

    def growth(self, count: int) -> dict[str, Any]:
        chance = random.Random(0)
        resident, active = [], []
        outcomes: Counter[str] = Counter()
        with self.engine(cache_bytes=20_000_000, prefill_chunk=64) as engine:
            for begin in range(0, count, 50):
                requests = [self._mixed(engine, chance) for _ in range(50)]
                results = [_outcome(request) for request in requests]
                outcomes.update(one if isinstance(one, str) else one.finish_reason for one in results)
                if begin % 200 == 0:
                    outcomes += self._mixed_up(engine, requests, results)
                if (begin + 50) % max(count // 4, 50) == 0:
                    resident.append(_resident())
                    active.append(mx.get_active_memory() / 1e6)
        return {
            "requests": count,
            "outcomes": outcomes,
            "resident_mb_after_each_quarter": resident,
            "mlx_mb_after_each_quarter": active,
        }

    def _mixed_up(self, engine: Engine, requests: list[Request], results: list[Reply | str]) -> Counter[str]:
        """Ask again, one by one: is the answer the one that was given in the crowd?"""
        found: Counter[str] = Counter()
        for request, result in zip(requests, results, strict=True):
            if isinstance(result, Reply) and result.finish_reason == "length":
                alone = engine.generate(request.prompt, request.options)
                found["same as alone" if alone.tokens == result.tokens else "MIXED UP"] += 1
        return found

    def _mixed(self, engine: Engine, chance: random.Random) -> Request:
        picture = self.picture((1, 4, 2 * chance.randint(2, 6))) if chance.random() < 0.6 else None
        prompt = self.question(picture, chance.randint(1, 200))
        options = GenerationOptions(
            max_tokens=chance.randint(1, 30),
            temperature=chance.choice([0.0, 0.8]),
            repetition_penalty=chance.choice([None, 1.1]),
            seed=chance.randrange(1000),
            ignore_eos=True,
        )
        if picture is not None and chance.random() < 0.1:  # fails in the vision tower
            prompt = Prompt(prompt.input_ids, [Media("image", np.zeros((3, 3), np.float32), picture.grid)])
        request = engine.submit(prompt, options)
        if chance.random() < 0.1:
            request.cancel()
        return request


class _Slices:
    """Watches how long the loop's slices of reading take."""

    def __init__(self, engine: Engine) -> None:
        self.longest = 0.0
        self.idle = False
        loop = engine._loop
        read = loop._read
        began = False

        def timed() -> None:
            nonlocal began
            begin = time.perf_counter()
            read()
            mx.synchronize()
            reading = bool(loop._reading)
            if reading or began:
                self.longest = max(self.longest, time.perf_counter() - begin)
                self.idle = began and not reading
                began = True

        loop._read = timed  # type: ignore[method-assign]


def _pauses(events: Any, count: int) -> list[float]:
    """Seconds between events that bring text."""
    pauses = []
    begin = time.perf_counter()
    while len(pauses) < count:
        if isinstance(next(events), TextEvent):
            now = time.perf_counter()
            pauses.append(now - begin)
            begin = now
    return pauses


def _end(request: Request, reply: Reply) -> float:
    return request.submitted + reply.timings.ttft + reply.timings.decode


def _outcome(request: Request) -> Reply | str:
    try:
        return request.result()
    except QwenVLError as error:
        return type(error).__name__


def _resident() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss / 1e6)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-vl-250m")
    names = ("second", "batch", "gap", "growth")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument(
        "--cpu-time", action="store_true", help="seconds of this process, where others use the machine too"
    )
    args = parser.parse_args(argv)
    if args.cpu_time:
        time.perf_counter = time.process_time
    print(json.dumps(describe()))
    large = Bench(shape(args.shape)) if set(args.only) - {"growth"} else None
    for name in args.only:
        begin = time.perf_counter()
        if large and name != "growth":
            figures = getattr(large, name)()
        else:
            config = shape(args.shape)
            vision = {**config["vision_config"], **SMALL_VISION, "fullatt_block_indexes": [3]}
            figures = Bench({**config, **SMALL, "vision_config": vision}).growth(args.requests)
        print(json.dumps({name: figures, "took_s": round(time.perf_counter() - begin, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
