"""One request through the engine: the model's own tokens, limits, stops, events, cancellation, faults."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import END, FakeModel, FakeProcessor, ask, greedy, picture

from qwenvl_mlx.engine import (
    Engine,
    EngineOptions,
    FinishEvent,
    GenerationOptions,
    Request,
    TextEvent,
)
from qwenvl_mlx.errors import Busy, GenerationError, MediaError, PromptError
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.processor.base import GenerationDefaults


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(scope="module")
def engine(model: FakeModel) -> Iterator[Engine]:
    with Engine(model, FakeProcessor(), EngineOptions(prefill_chunk=7)) as engine:
        yield engine


def options(**values: object) -> GenerationOptions:
    return GenerationOptions(**{"max_tokens": 20, "ignore_eos": True, **values})  # type: ignore[arg-type]


def test_chunked_prefill_and_decode_give_the_models_own_tokens(engine: Engine, model: FakeModel) -> None:
    prompt = engine.prompt(ask("what is this, and that?", picture(1), picture(2)))
    reply = engine.generate(prompt, options(max_tokens=30))
    assert reply.tokens == greedy(model, prompt, 30)
    assert reply.finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 30)
    assert reply.prompt_token_ids == prompt.input_ids
    assert reply.timings.ttft > 0


def test_pieces_add_up_to_the_reply(engine: Engine) -> None:
    *pieces, last = engine.stream("hello", options(max_tokens=40, logprobs=2))
    assert isinstance(last, FinishEvent)
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextEvent)) == last.reply.text
    tokens = [token for piece in pieces if isinstance(piece, TextEvent) for token in piece.tokens]
    assert tokens == last.reply.tokens
    assert len(last.reply.logprobs) == 40
    for token, entry in zip(last.reply.tokens, last.reply.logprobs, strict=True):
        assert entry.token == token == entry.top[0][0]  # greedy
        assert entry.logprob == pytest.approx(entry.top[0][1], abs=1e-5)
        assert entry.top[0][1] >= entry.top[1][1]


def test_end_of_answer_token_ends_it(model: FakeModel) -> None:
    prompt = FakeProcessor()(ask("hello"))
    tokens = greedy(model, prompt, 8)
    eos = tokens[5]
    wanted = tokens[: tokens.index(eos) + 1]
    with Engine(model, FakeProcessor(GenerationDefaults(eos_token_ids=frozenset({eos})))) as engine:
        reply = engine.generate(prompt, GenerationOptions(max_tokens=8))
        assert (reply.finish_reason, reply.tokens) == ("stop", wanted)
        assert engine.generate(prompt, options(max_tokens=8)).tokens == tokens


def test_stop_string_across_tokens_is_cut_off(engine: Engine) -> None:
    whole = engine.generate("tell me", options(max_tokens=60)).text
    stop = whole[10:14]
    reply = engine.generate("tell me", options(max_tokens=60, stop=(stop,)))
    assert reply.finish_reason == "stop"
    assert reply.text == whole[: whole.index(stop)]


def test_limits_come_from_request_then_checkpoint_then_context(model: FakeModel) -> None:
    processor = FakeProcessor(GenerationDefaults(max_tokens=4, eos_token_ids=frozenset({END})))
    with Engine(model, processor) as engine:
        assert len(engine.generate("x", GenerationOptions(ignore_eos=True)).tokens) == 4
    small = EngineOptions(max_kv_size=24)
    with Engine(model, FakeProcessor(), small) as engine:
        prompt = engine.prompt("x" * 10)
        reply = engine.generate(prompt, GenerationOptions(ignore_eos=True))
        assert len(prompt) + len(reply.tokens) == 24
        with pytest.raises(PromptError, match="limit is 24"):
            engine.submit("x" * 30)


def test_empty_prompt_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match="empty"):
        engine.submit(Prompt([]))


def test_defaults_of_the_checkpoint_are_used(model: FakeModel) -> None:
    hot = FakeProcessor(GenerationDefaults(temperature=1.5))
    with Engine(model, hot) as engine:
        replies = [engine.generate("x", options(seed=seed)).tokens for seed in (1, 1, 2)]
        cold = engine.generate("x", options(temperature=0.0)).tokens
    assert replies[0] == replies[1] != replies[2]
    assert cold == greedy(model, hot(ask("x")), 20)


def test_cancel_ends_within_a_step_and_keeps_what_was_said(engine: Engine) -> None:
    request = engine.submit("go on", options(max_tokens=400))
    events = iter(request)
    first = next(events)
    request.cancel()
    reply = request.result()
    assert isinstance(first, TextEvent)
    assert reply.finish_reason == "cancelled"
    assert 0 < len(reply.tokens) < 400
    assert reply.text.startswith(first.text)


def test_leaving_a_stream_cancels_its_request(engine: Engine) -> None:
    stream = engine.stream("go on", options(max_tokens=400))
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]
    begin = time.perf_counter()
    engine.generate("next", options(max_tokens=1))
    assert time.perf_counter() - begin < 2


def test_a_bad_request_fails_alone(engine: Engine) -> None:
    with pytest.raises(PromptError, match="differ"):  # a picture without placeholders
        engine.submit(Prompt([65, 66, 67], [picture()]), options())
    request = engine.submit(ask("what?", picture(kind="video")), options())
    with pytest.raises(MediaError, match="no videos"):
        request.result()
    assert len(engine.generate("still here?", options(max_tokens=3)).tokens) == 3


def test_a_listener_gets_every_event(engine: Engine) -> None:
    events: list[object] = []
    done = threading.Event()

    def listen(event: object) -> None:
        events.append(event)
        if isinstance(event, FinishEvent):
            done.set()

    engine.submit("x", options(max_tokens=5), listener=listen)
    assert done.wait(10)
    assert isinstance(events[0], TextEvent)


def test_full_queue_is_busy(model: FakeModel) -> None:
    with Engine(model, FakeProcessor(), EngineOptions(max_queue=1, max_batch=1)) as engine:
        running: list[Request] = []

        def flood() -> None:
            for _ in range(50):
                running.append(engine.submit("y", options(max_tokens=450)))

        with pytest.raises(Busy, match="try again"):
            flood()
        for request in running:
            request.cancel()


def test_the_interpreter_exits_cleanly_afterwards() -> None:
    code = (
        "from fakes import FakeModel, FakeProcessor\n"
        "from qwenvl_mlx.engine import Engine, GenerationOptions\n"
        "with Engine(FakeModel(), FakeProcessor()) as engine:\n"
        "    print(len(engine.generate('x', GenerationOptions(max_tokens=3, ignore_eos=True)).tokens))\n"
    )
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_closing_fails_what_is_under_way(model: FakeModel) -> None:
    engine = Engine(model, FakeProcessor())
    request = engine.submit("x", options(max_tokens=450))
    engine.close()
    with pytest.raises(GenerationError, match="closed"):
        request.result()
    with pytest.raises(GenerationError, match="closed"):
        engine.submit("y")


def test_a_listener_that_fails_ends_its_own_request_only(model: FakeModel) -> None:
    def broken(event: object) -> None:
        raise RuntimeError("the event loop is closed")

    with Engine(model, FakeProcessor(), EngineOptions(max_queue=100)) as engine:
        for _ in range(5):
            engine.submit("x", options(max_tokens=400), listener=broken)
        assert len(engine.generate("y", options(max_tokens=30)).tokens) == 30
        assert engine.alive


class Fatal(FakeModel):
    """Fails in a way that no request can cause."""

    def decode(self, tokens: object, cache: object) -> object:  # type: ignore[override]
        if len(self.encoded) == 1:  # the engine tries the model once when it is made
            raise AssertionError("broken")
        return super().decode(tokens, cache)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_has_died() -> None:
    engine = Engine(Fatal(), FakeProcessor(), EngineOptions(max_queue=10**6))
    outcomes: list[str] = []

    def ask_on() -> None:
        while engine.alive:
            try:
                engine.generate("x", options(max_tokens=3))
            except GenerationError as error:
                outcomes.append(str(error))

    threads = [threading.Thread(target=ask_on) for _ in range(8)]
    for thread in threads:
        thread.start()
    engine.submit(ask("what?", picture(1)), options())
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert outcomes
    with pytest.raises(GenerationError, match="closed"):
        engine.submit("x")
    engine.close()
