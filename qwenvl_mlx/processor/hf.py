"""The processor of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: messages or text with media -> Prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl_mlx.config import read_json
from qwenvl_mlx.errors import CheckpointError, MediaError, PromptError
from qwenvl_mlx.media import Media, Prompt, media_kinds
from qwenvl_mlx.processor import grounding_json
from qwenvl_mlx.processor.answer import THINK, AnswerSplitter
from qwenvl_mlx.processor.base import Box, GenerationDefaults, MediaOptions, Message, Processor, ToolFormat
from qwenvl_mlx.processor.chat_template import ChatTemplate
from qwenvl_mlx.processor.fetch import load_image, source_of
from qwenvl_mlx.processor.frames import open_frames
from qwenvl_mlx.processor.hf_tokenizer import HFTokenizer
from qwenvl_mlx.processor.messages import conversation, kind_of
from qwenvl_mlx.processor.patches import image_media
from qwenvl_mlx.processor.rules import PatchRules, VideoRules, read_rules
from qwenvl_mlx.processor.side_by_side import side_by_side
from qwenvl_mlx.processor.tool_calls import Tools
from qwenvl_mlx.processor.video import video_media, with_request

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
TIMED = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
GENERATIONS = ("qwen2_vl", "qwen2_5_vl", *TIMED)

_PAD = re.compile("|".join(map(re.escape, PADS.values())))
_WRAPPED_PAD = re.compile(
    f"{re.escape(PADS['image'])}"
    f"|(?:{re.escape(VISION_START)})?{re.escape(PADS['video'])}(?:{re.escape(VISION_END)})?"
)


@dataclass(frozen=True)
class HFProcessor(Processor):
    """``generation``: the checkpoint's model_type. ``context_length``: most tokens of a prompt, None for no check.

    ``nested_timestamps``: write the times of Qwen3-VL's frames inside the outer vision tags, as transformers 5 does,
    and not in their place, as at the model's release.
    """

    tokenizer: HFTokenizer
    defaults: GenerationDefaults
    generation: str
    chat_template: ChatTemplate
    image_rules: PatchRules
    video_rules: VideoRules
    context_length: int | None = None
    nested_timestamps: bool = False
    tool_format: ToolFormat = "json"

    @classmethod
    def from_folder(
        cls, folder: Path, config: Mapping[str, Any], *, nested_timestamps: bool = False
    ) -> HFProcessor:
        """``config``: the content of ``config.json``. Raises ``CheckpointError``, ``ConfigError``."""
        generation = str(config.get("model_type"))
        tokenizer = HFTokenizer.from_folder(folder)
        for name in (VISION_START, VISION_END, *PADS.values()):
            if tokenizer.id(name) is None:
                raise CheckpointError(
                    f"{folder}: the tokenizer lacks {name}: copy the checkpoint's own tokenizer files"
                )
        image_rules, video_rules = read_rules(folder, config, timed=generation in TIMED)
        text = config.get("text_config") or config
        chat_template = ChatTemplate.from_folder(folder)
        return cls(
            tokenizer=tokenizer,
            defaults=_defaults(folder, config, tokenizer),
            generation=generation,
            chat_template=chat_template,
            image_rules=image_rules,
            video_rules=video_rules,
            context_length=text.get("max_position_embeddings"),
            nested_timestamps=nested_timestamps,
            tool_format="xml" if chat_template.mentions("<function=") else "json",
        )

    @property
    def max_pixels(self) -> int:
        return self.image_rules.max_pixels

    def knows(self, variable: str) -> bool:
        return self.chat_template.mentions(variable)

    @property
    def max_frames(self) -> int:
        return self.video_rules.max_frames

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: MediaOptions | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Prompt:
        variables = dict(template or {})
        nested = bool(variables.pop("nested_timestamps", self.nested_timestamps))
        argument_text = self.chat_template.takes_argument_text(tools=bool(tools))
        plain = conversation(messages, argument_text=argument_text)
        text = self.chat_template.render(plain.messages, tools=tools, **variables)
        return self._prompt(text, plain.parts, options, nested=nested)

    def raw(
        self,
        text: str,
        media: Sequence[Mapping[str, Any] | Media] = (),
        *,
        options: MediaOptions | None = None,
    ) -> Prompt:
        return self._prompt(text, media, options, nested=self.nested_timestamps)

    def boxes(self, text: str, prompt: Prompt) -> list[Box]:
        """Answers don't say which picture they speak of: it is taken to be the last."""
        images = [media for media in prompt.media if media.kind == "image"]
        if not images or images[-1].source_size is None:
            return []
        source, last = images[-1].source_size, len(images) - 1
        if self.generation == "qwen2_vl":
            return grounding_json.tagged_boxes(text, source, image=last)
        patch = self.image_rules.patch_size
        resized = (images[-1].grid[2] * patch, images[-1].grid[1] * patch)
        scale = resized if self.generation == "qwen2_5_vl" else grounding_json.THOUSAND
        return grounding_json.json_boxes(text, scale, source, image=last)

    def splitter(self, prompt: Prompt, tools: Tools | None = None) -> AnswerSplitter:
        """What tells reasoning, content and calls of the answer to ``prompt`` apart; without ``tools`` no calls."""
        end = self.tokenizer.decode(prompt.input_ids[-4:], skip_special=False)
        return AnswerSplitter(opened=end.rstrip().endswith(THINK), tools=tools)

    def _prompt(
        self,
        text: str,
        parts: Sequence[Mapping[str, Any] | Media],
        options: MediaOptions | None,
        *,
        nested: bool,
    ) -> Prompt:
        kinds = [part.kind if isinstance(part, Media) else kind_of(part) for part in parts]
        _check_placeholders(text, kinds)
        media = self._load(parts, _checked(options or MediaOptions()))
        if self.video_rules.timed:
            text = _with_times(text, media, self._video_text, nested=nested)
        ids = self._expand(self.tokenizer.encode(text), media)
        self._check_length(len(ids), media)
        return Prompt(ids, media)

    def _load(self, parts: Sequence[Mapping[str, Any] | Media], options: MediaOptions) -> list[Media]:
        """All media, several at a time; stops early when there are too many for the context."""
        sources = [part["image"] for part in parts if not isinstance(part, Media) and "image" in part]
        load = partial(self._load_one, options=options)
        return side_by_side(load, parts, sources, check=self._check_media)

    def _check_media(self, media: Sequence[Media]) -> None:
        self._check_length(sum(map(self._tokens, media)), media)

    def _load_one(self, part: Mapping[str, Any] | Media, *, options: MediaOptions) -> Media:
        if isinstance(part, Media):
            return part
        own = _checked(_part_options(part, options))
        if kind_of(part) == "image":
            picture = load_image(source_of(part, "image"), policy=own.policy)
            return image_media(
                picture, self.image_rules.limited(min_pixels=own.min_pixels, max_pixels=own.max_pixels)
            )
        frames = open_frames(source_of(part, "video"), fps=own.fps, policy=own.policy)
        rules = with_request(
            self.video_rules,
            min_pixels=own.min_pixels,
            max_pixels=own.max_pixels,
            fps=own.fps,
            max_frames=own.max_frames,
        )
        count = part.get("nframes")
        if count is not None and not (isinstance(count, int) and 0 < count <= rules.max_frames):
            raise MediaError(f"nframes is {count!r}: give a number from 1 to max_frames ({rules.max_frames})")
        return video_media(frames, rules, count=count, max_tokens=self.context_length)

    def _tokens(self, media: Media) -> int:
        t, h, w = media.grid
        return t * h * w // self.image_rules.merge_size**2

    def _video_text(self, media: Media) -> str:
        """One placeholder a frame group, with the time that it shows."""
        times = media.timestamps
        if times is None or len(times) != media.grid[0]:
            raise PromptError("the video has no time for each of its frame groups: give its timestamps")
        return "".join(f"<{time:.1f} seconds>{VISION_START}{PADS['video']}{VISION_END}" for time in times)

    def _expand(self, ids: Sequence[int], media: Sequence[Media]) -> list[int]:
        """Repeat each placeholder as often as its media has tokens (Qwen3-VL: as its frame group has)."""
        lengths = iter(self._spans(media))
        pads = {self.tokenizer.id(pad) for pad in PADS.values()}
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * next(lengths) if token in pads else [token]
        return expanded

    def _spans(self, media: Iterable[Media]) -> Iterator[int]:
        for item in media:
            spans = item.grid[0] if item.kind == "video" and self.video_rules.timed else 1
            yield from [self._tokens(item) // spans] * spans

    def _check_length(self, tokens: int, media: Sequence[Media]) -> None:
        if self.context_length is not None and tokens > self.context_length:
            cure = "send fewer or smaller ones (max_pixels, fps, max_frames)" if media else "shorten it"
            raise PromptError(
                f"the prompt has at least {tokens} tokens ({media_kinds(media)}) but the model takes "
                f"{self.context_length}: {cure}"
            )


def _check_placeholders(text: str, kinds: Sequence[str]) -> None:
    names = {pad: kind for kind, pad in PADS.items()}
    wanted = [names[found] for found in _PAD.findall(text)]
    if wanted != list(kinds):
        raise PromptError(
            f"the text has placeholders for {_listed(wanted)} but {_listed(kinds)} came with it: "
            f"write one {PADS['image']} or {PADS['video']} for each, in the same order"
        )


def _listed(kinds: Sequence[str]) -> str:
    shown = ", ".join(kinds[:8]) + (", …" if len(kinds) > 8 else "")
    return f"{len(kinds)} media ({shown})" if kinds else "no media"


def _with_times(
    text: str, media: Sequence[Media], video_text: Callable[[Media], str], *, nested: bool
) -> str:
    """Write out each video's frame groups in place of its placeholder, with the tags around it unless ``nested``."""
    items = iter(media)

    def replacement(found: re.Match[str]) -> str:
        item = next(items)
        return video_text(item) if item.kind == "video" else found[0]

    return (_PAD if nested else _WRAPPED_PAD).sub(replacement, text)


def _part_options(part: Mapping[str, Any], options: MediaOptions) -> MediaOptions:
    """A part's own wishes come before the request's. ``sample_fps`` is how some call the rate of given frames."""
    return replace(
        options,
        min_pixels=part.get("min_pixels", options.min_pixels),
        max_pixels=part.get("max_pixels", options.max_pixels),
        fps=part.get("fps", part.get("sample_fps", options.fps)),
        max_frames=part.get("max_frames", options.max_frames),
    )


def _checked(options: MediaOptions) -> MediaOptions:
    for name in ("min_pixels", "max_pixels", "fps", "max_frames"):
        value = getattr(options, name)
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise MediaError(f"{name} is {value!r}: give a number above 0")
    low, high = options.min_pixels, options.max_pixels
    if low is not None and high is not None and low > high:
        raise MediaError(f"min_pixels {low} is more than max_pixels {high}: swap them")
    return options


def _defaults(folder: Path, config: Mapping[str, Any], tokenizer: HFTokenizer) -> GenerationDefaults:
    path = folder / "generation_config.json"
    raw = read_json(path) if path.is_file() else {}
    known = [
        raw.get("eos_token_id"),
        config.get("eos_token_id"),
        (config.get("text_config") or {}).get("eos_token_id"),
    ]
    known += [tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>")]
    eos = [number for item in known for number in (item if isinstance(item, list) else [item])]
    sampled = raw.get("do_sample", False)
    return GenerationDefaults(
        temperature=raw.get("temperature") if sampled else 0.0 if raw else None,
        top_p=raw.get("top_p"),
        top_k=raw.get("top_k"),
        repetition_penalty=raw.get("repetition_penalty"),
        max_tokens=raw.get("max_new_tokens"),
        eos_token_ids=frozenset(number for number in eos if isinstance(number, int)),
    )
