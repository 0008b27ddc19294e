"""Leave the server alone with many clients, a third of whom hang up: is anything lost, mixed or leaked?

    python -m benchmarks.soak --model demo --minutes 10 --clients 64

Every question is asked once alone; under load its greedy answer must be the same. Memory is that of the server's
process. The last part measures what the server itself costs for each token, with an engine that costs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

MIB = 1 << 20
QUESTIONS = 12
LEAVERS = 3
"""Every so many-th client hangs up in the middle of its answers."""


@dataclass
class Tally:
    """What happened."""

    outcomes: Counter[str] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)  # whole answers, by client
    waits: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    handles: list[int] = field(default_factory=list)  # threads and open files


def question(number: int) -> dict[str, Any]:
    """A request whose answer is known after the first time; every other one has a picture."""
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": f"Question {number}: count to {number + 3}, please."}
    ]
    if number % 2:
        parts.insert(0, {"type": "image", "image": _picture(number)})
    return {
        "model": "any",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": 12 + number,
        "ignore_eos": True,
    }


def _picture(number: int) -> str:
    import base64
    import io

    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (64 + 8 * number, 64), (20 * number % 256, 90, 160)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


async def ask(client: httpx.AsyncClient, number: int) -> str:
    """The whole answer, without streaming."""
    response = await client.post("/v1/chat/completions", json=question(number))
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


async def stream(
    client: httpx.AsyncClient, number: int, *, leave_after: int | None, tally: Tally
) -> str | None:
    """The answer, streamed; None when we hang up after some chunks."""
    text, chunks, started, complete = "", 0, time.monotonic(), False
    body = {**question(number), "stream": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                complete = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                piece = chunk["choices"][0]["delta"].get("content") or ""
                if piece and not text:
                    tally.waits.append(time.monotonic() - started)
                text += piece
                chunks += 1
                if leave_after is not None and chunks > leave_after:
                    return None
    if not complete:
        raise RuntimeError("the stream ended without [DONE]")
    return text


async def one_client(url: str, seed: int, until: float, known: Sequence[str], tally: Tally) -> None:
    """Ask one question after the other; every third client hangs up in the middle."""
    rng = random.Random(seed)
    leaves = seed % LEAVERS == 0
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        while time.monotonic() < until:
            number = rng.randrange(QUESTIONS)
            try:
                if leaves and rng.random() < 0.5:  # before the first word, often still in the queue
                    with contextlib.suppress(TimeoutError):
                        text = None
                        text = await asyncio.wait_for(ask(client, number), 2 * rng.random())
                elif leaves or rng.random() < 0.5:
                    after = rng.randrange(8) if leaves else None
                    text = await stream(client, number, leave_after=after, tally=tally)
                else:
                    text = await ask(client, number)
            except httpx.HTTPStatusError as error:
                tally.outcomes[f"status {error.response.status_code}"] += 1
                await asyncio.sleep(1)
                continue
            except (httpx.HTTPError, RuntimeError) as error:
                tally.outcomes[f"LOST ({type(error).__name__}: {error})"] += 1
                continue
            tally.outcomes["left" if text is None else "right" if text == known[number] else "MIXED"] += 1
            tally.answered[seed] += text is not None and not leaves


async def watch(process: psutil.Process, until: float, tally: Tally) -> None:
    """Resident memory, threads and open files of the server, once a second."""
    while time.monotonic() < until:
        tally.memory.append(process.memory_info().rss / MIB)
        tally.handles.append(process.num_threads() + process.num_fds())
        await asyncio.sleep(1)


async def soak(url: str, process: psutil.Process, minutes: float, clients: int) -> Tally:
    """Known answers first, then all clients at once."""
    tally = Tally()
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        known = [await ask(client, number) for number in range(QUESTIONS)]
        until = time.monotonic() + 60 * minutes
        await asyncio.gather(
            watch(process, until, tally),
            *(one_client(url, seed, until, known, tally) for seed in range(clients)),
        )
        await asyncio.sleep(2)
        metrics = (await client.get("/metrics")).text
        for name in ("qwenvl_active_requests", "qwenvl_waiting", "qwenvl_running"):
            rows = [line for line in metrics.splitlines() if line.startswith(name)]
            if any(float(row.split()[-1]) for row in rows):
                tally.outcomes[f"STILL THERE: {rows}"] += 1
    return tally


def report(tally: Tally) -> bool:
    """Print it; whether all is well."""
    waits = sorted(tally.waits)
    third = max(len(tally.memory) // 3, 1)
    early, late = statistics.median(tally.memory[third : 2 * third]), statistics.median(tally.memory[-third:])
    each = sorted(count for client, count in tally.answered.items() if client % LEAVERS)
    print(f"answers: {dict(tally.outcomes)}")
    print(f"first text after: median {statistics.median(waits):.2f} s, longest {waits[-1]:.2f} s")
    print(f"whole answers of a client that stays: from {each[0]} to {each[-1]}")
    print(f"memory: {early:.0f} MiB in the middle third, {late:.0f} MiB in the last: {late - early:+.0f} MiB")
    handles = [statistics.median(some) for some in (tally.handles[third : 2 * third], tally.handles[-third:])]
    print(f"threads and open files: {handles[0]:.0f}, then {handles[1]:.0f}")
    return not any(name.isupper() or name[:4].isupper() for name in tally.outcomes)


class Pump:
    """An engine that costs nothing: its tokens come from a list."""

    def __init__(self, processor: Any, tokens: int) -> None:
        self.processor, self.tokens, self.alive, self.waiting, self.running = processor, tokens, True, 0, 0
        self.model = type("Model", (), {"vocab_size": 512, "context_length": 4096})()

    def submit(self, prompt: Any, options: Any, *, listener: Any) -> Any:
        from qwenvl_mlx.engine import FinishEvent, Reply, Request, TextEvent, Timings, Usage

        def run() -> None:
            for number in range(self.tokens):
                listener(TextEvent(f" word{number % 10}", [number]))
                if number % 16 == 0:
                    time.sleep(0)
            usage = Usage(len(prompt), self.tokens)
            listener(FinishEvent(Reply("", [], "length", usage, Timings(), prompt_token_ids=[1])))

        threading.Thread(target=run).start()
        return Request(prompt, options, listener)

    def close(self) -> None:
        pass


def overhead(source: str, tokens: int = 5000) -> float:
    """Seconds of CPU that server and client spend on one streamed token."""
    import uvicorn

    from qwenvl_mlx import hub
    from qwenvl_mlx.config import read_json
    from qwenvl_mlx.processor.load import load_processor
    from qwenvl_mlx.server.app import create_app
    from qwenvl_mlx.server.shelf import Offer, Shelf

    folder = hub.resolve(source)
    pump = Pump(load_processor(folder, read_json(folder / "config.json")), tokens)
    shelf = Shelf([Offer("pump", "")], lambda source: pump, any_name=True)  # type: ignore[arg-type, return-value]
    shelf.preload()
    server = uvicorn.Server(uvicorn.Config(create_app(shelf), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    body = {"model": "x", "messages": [{"role": "user", "content": "go"}], "stream": True}
    seconds = []
    for _ in range(3):
        started = time.process_time()
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60
        ) as response:
            for _ in response.iter_raw():
                pass
        seconds.append((time.process_time() - started) / tokens)
    server.should_exit = True
    thread.join()
    return min(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--cache-bytes",
        default="64M",
        help="of the prefix cache: it must be full early, to tell it from a leak",
    )
    args = parser.parse_args()
    port = str(random.randrange(20_000, 40_000))
    command = [sys.executable, "-m", "qwenvl_mlx.server", "--model", args.model, "--port", port]
    command += ["--dtype", "float32", "--log-level", "warning", "--max-queue", str(2 * args.clients)]
    command += ["--cache-bytes", args.cache_bytes]
    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, cwd=root, stderr=log) as server:
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_for(url, server)
            tally = asyncio.run(soak(url, psutil.Process(server.pid), args.minutes, args.clients))
        finally:
            server.terminate()
            server.wait(60)
            log.seek(0)
            sys.stderr.write(log.read().decode()[-2000:])
    well = report(tally)
    print(f"the server's own cost: {1e6 * overhead(args.model):.0f} µs of CPU a token, client included")
    return 0 if well else 1


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            httpx.get(f"{url}/health")
        except httpx.HTTPError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    sys.exit(main())
