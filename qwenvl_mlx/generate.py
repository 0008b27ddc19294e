"""``python -m qwenvl_mlx.generate``: ask about pictures and videos once, text on stdout, statistics on stderr."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_mlx import cli
from qwenvl_mlx.errors import OutputError, PromptError

if TYPE_CHECKING:
    from qwenvl_mlx.engine import Event, Reply

Part = dict[str, Any]

DRAWABLE = (".png", ".jpg", ".jpeg", ".webp")
IMG_TAG = re.compile(r"<img>(.+?)</img>", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    _check(parser, args)
    cli.set_up_logging(args)
    return cli.run(lambda: _work_through(args) if args.batch else _work(args))


def _parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("generate", "Answer one prompt about pictures and videos.")
    cli.add_model_argument(parser)
    prompt = parser.add_argument_group("prompt")
    for kind in ("image", "video"):
        prompt.add_argument(
            f"--{kind}",
            action="append",
            dest="media",
            default=[],
            type=_part(kind),
            metavar="PATH",
            help=f"{kind} file, URL or data URI; repeatable, stands before the text",
        )
    prompt.add_argument("--prompt", metavar="TEXT", help="the question")
    prompt.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    prompt.add_argument(
        "--messages", type=Path, metavar="FILE.json", help="a whole conversation, OpenAI style"
    )
    prompt.add_argument("--raw", action="store_true", help="send the prompt without a chat template")
    prompt.add_argument(
        "--batch",
        type=Path,
        metavar="IN.jsonl",
        help="many prompts, one JSON object a line; or a folder of pictures",
    )
    cli.add_media_options(parser)
    cli.add_sampling_options(parser, max_tokens=1024)
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the end of the answer")
    cli.add_engine_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        metavar="OUT.jsonl",
        help="answers to --batch; run again, it goes on where it ended",
    )
    output.add_argument("--json", action="store_true", help="print one JSON object in place of text")
    output.add_argument("--boxes", type=Path, metavar="OUT.png", help="draw the places that the answer names")
    return parser


def _part(kind: str) -> Callable[[str], Part]:
    return lambda source: {"type": kind, kind: source}


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error (code 2) where options contradict each other."""
    if (args.batch is None) != (args.output is None):
        parser.error("--batch and --output go together")
    if args.batch:
        if args.messages or args.media or args.raw or args.boxes or args.json:
            parser.error("--batch takes only --prompt and --system for lines that have none, and options")
        return
    if (args.prompt is None) == (args.messages is None):
        parser.error("give either --prompt or --messages")
    if args.messages and (args.raw or args.system or args.media):
        parser.error("--messages already holds everything: leave out --raw, --system, --image and --video")
    if args.raw and args.system:
        parser.error("--raw takes no --system: write it into the prompt")


def _work(args: argparse.Namespace) -> None:
    messages = _messages(args)  # what may be a slip is told before the model is loaded
    options = cli.generation_options(args)
    picture = _picture_to_draw_on(args, messages) if args.boxes else None
    cli.use_device(args.device)
    from qwenvl_mlx.api import load
    from qwenvl_mlx.engine import Engine

    group = cli.machines()
    if group is not None and options.seed is None:
        options = dataclasses.replace(options, seed=0)  # all must draw the same
    model, processor = load(args.model, dtype=args.dtype, group=group)
    media = cli.media_options(args)
    prompt = (
        processor.raw(args.prompt, args.media, options=media)
        if args.raw
        else processor(messages, options=media)
    )
    usual = dataclasses.replace(cli.engine_options(args), cache_bytes=0)  # one answer: nothing to remember
    with Engine(model, processor, usual) as engine:
        events = engine.stream(prompt, options)
        reply = _print_json(events) if args.json else _print_text(events)
    _print_statistics(reply)
    if args.boxes:
        _draw(reply, picture, args.boxes)


def _work_through(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from qwenvl_mlx.bulk import Bulk, keep_finished, read_tasks

    tasks, options = read_tasks(args.batch), cli.generation_options(args)
    finished = keep_finished(args.output, tasks)
    waiting = [task for task in tasks if task.name not in finished]
    cli.refuse_machines()
    cli.use_device(args.device)
    from qwenvl_mlx.api import load
    from qwenvl_mlx.engine import Engine

    model, processor = load(args.model, dtype=args.dtype)
    usual = {name: getattr(args, name) for name in ("prompt", "system") if getattr(args, name)}
    failed = 0
    with (
        Engine(model, processor, cli.engine_options(args)) as engine,
        args.output.open("a", encoding="utf-8") as out,
    ):
        bulk = Bulk(engine, options, cli.media_options(args), usual)
        records = tqdm(bulk.run(waiting), total=len(tasks), initial=len(finished), unit="line", disable=None)
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()  # a kill loses what is being answered, not what was
            failed += "error" in record
    print(f"{len(waiting) - failed} answered, {len(finished)} were there, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


def _picture_to_draw_on(args: argparse.Namespace, messages: Sequence[Part]) -> Any:
    """The source of the last picture: answers speak of it."""
    if not args.boxes.absolute().parent.is_dir():
        raise OutputError(f"{args.boxes.parent} is not a folder: make it, or give another --boxes")
    if args.boxes.suffix.lower() not in DRAWABLE:
        raise OutputError(f"{args.boxes} is no picture file: let --boxes end in one of {', '.join(DRAWABLE)}")
    sources = [source for message in messages for source in _pictures(message.get("content"))]
    if not sources:
        raise PromptError("--boxes needs a picture to draw on: give --image")
    return sources[-1]


def _pictures(content: Any) -> list[Any]:
    from qwenvl_mlx.processor.fetch import source_of

    if isinstance(content, str):
        return IMG_TAG.findall(content)  # the original Qwen-VL's way to name a picture in the text
    parts = [part for part in content or [] if isinstance(part, dict)]
    found = []
    for part in parts:
        if part.get("type", "image") in ("image", "image_url") and "text" not in part:
            found.append(source_of(part, "image"))
        elif isinstance(part.get("text"), str):
            found += IMG_TAG.findall(part["text"])
    return found


def _draw(reply: Reply, source: Any, path: Path) -> None:
    from qwenvl_mlx.processor.fetch import load_image
    from qwenvl_mlx.processor.grounding import draw

    draw(load_image(source), reply.boxes).convert("RGB").save(path)
    count = len(reply.boxes) or "the answer names no place, so no"
    print(f"{path}: {count} box{'' if len(reply.boxes) == 1 else 'es'} drawn", file=sys.stderr)


def _messages(args: argparse.Namespace) -> list[Part]:
    if args.messages:
        return read_messages(args.messages)
    system = [{"role": "system", "content": args.system}] if args.system else []
    text = {"type": "text", "text": args.prompt}  # after the pictures, as the models were trained
    return [*system, {"role": "user", "content": [*args.media, text] if args.media else args.prompt}]


def read_messages(path: Path) -> list[Part]:
    """A list of messages, or an object with one under ``messages``; ``PromptError`` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PromptError(f"{path} does not exist: check --messages") from None
    except IsADirectoryError:
        raise PromptError(f"{path} is a folder: give a JSON file as --messages") from None
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not JSON ({error})") from error
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise PromptError(f'{path} must hold a list like [{{"role": "user", "content": "..."}}]')
    return messages


def _print_text(events: Iterator[Event]) -> Reply:
    from qwenvl_mlx.engine import FinishEvent

    for event in events:
        if isinstance(event, FinishEvent):
            print(flush=True)
            return event.reply
        print(event.text, end="", flush=True)
    raise RuntimeError("the engine ended without a reply")


def _print_json(events: Iterator[Event]) -> Reply:
    *_, last = events
    reply: Reply = last.reply  # type: ignore[union-attr]  # FinishEvent
    print(json.dumps(as_json(reply), ensure_ascii=False))
    return reply


def as_json(reply: Reply) -> dict[str, Any]:
    """A reply as the object that ``--json`` prints."""
    return {
        "text": reply.text,
        "tokens": reply.tokens,
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "cached_tokens": reply.usage.cached_tokens,
        "prompt_token_ids": reply.prompt_token_ids,
        "finish_reason": reply.finish_reason,
        "boxes": [dataclasses.asdict(box) for box in reply.boxes],
        "picture_sizes": reply.picture_sizes,
        "timings": dataclasses.asdict(reply.timings),
    }


def _print_statistics(reply: Reply) -> None:
    usage, timings = reply.usage, reply.timings
    cached = f" ({usage.cached_tokens} cached)" if usage.cached_tokens else ""
    vision = f", pictures {timings.vision:.2f} s" if timings.vision else ""
    print(
        f"prompt: {usage.prompt_tokens} tokens{cached}, {timings.prompt_tokens_per_second:.1f} tokens/s{vision}\n"
        f"answer: {usage.completion_tokens} tokens, {timings.tokens_per_second:.1f} tokens/s, "
        f"the first after {timings.ttft:.2f} s\npeak memory: {_peak_gigabytes():.2f} GB",
        file=sys.stderr,
    )


def _peak_gigabytes() -> float:
    import mlx.core as mx

    return mx.get_peak_memory() / 1e9


if __name__ == "__main__":
    sys.exit(main())
