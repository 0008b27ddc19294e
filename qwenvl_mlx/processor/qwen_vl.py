"""The processor of the original Qwen-VL and Qwen-VL-Chat: ChatML contexts, numbered pictures, dropped history."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qwenvl_mlx.config import from_dict, one_of, read_json
from qwenvl_mlx.errors import CheckpointError, ConfigError, PromptError
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.processor.base import Box, GenerationDefaults, MediaOptions, Message, Processor
from qwenvl_mlx.processor.dialogue import Content, Dialogue, Picture, read_content, read_dialogue
from qwenvl_mlx.processor.fetch import FetchPolicy, load_image
from qwenvl_mlx.processor.grounding import tagged_boxes
from qwenvl_mlx.processor.image import square_image
from qwenvl_mlx.processor.qwen_tokenizer import IMAGE_TAGS, SPECIALS, QwenTokenizer, normal_form, split
from qwenvl_mlx.processor.side_by_side import side_by_side

CHAT_FORMATS = ("chatml", "raw")


@dataclass
class Written:
    """Ids of a piece of the prompt, and the pictures in it, which are loaded only if the piece stays."""

    ids: list[int] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)

    def __iadd__(self, other: Written) -> Written:
        self.ids += other.ids
        self.pictures += other.pictures
        return self


@dataclass(frozen=True)
class Visual:
    """The keys of ``visual`` in ``config.json`` that shape prompts."""

    image_size: int
    patch_size: int
    image_start_id: int
    n_queries: int = 256


@dataclass(frozen=True)
class ChatForm:
    """The keys of ``generation_config.json`` that shape prompts."""

    chat_format: str = "chatml"
    max_window_size: int = 6144

    def __post_init__(self) -> None:
        one_of(self.chat_format, CHAT_FORMATS, key="chat_format", where="generation_config.json")


class QwenVLProcessor(Processor):
    """Source of the rules: the hub code of Qwen-VL-Chat (``make_context``) and its web demo (numbering)."""

    tool_format = "react"

    def __init__(
        self, tokenizer: QwenTokenizer, visual: Visual, form: ChatForm, defaults: GenerationDefaults
    ) -> None:
        self.tokenizer: QwenTokenizer = tokenizer
        self.defaults = defaults
        self._visual = visual
        self._form = form

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> QwenVLProcessor:
        """``config``: the folder's ``config.json``. Raises ``ConfigError``, ``CheckpointError``."""
        if not isinstance(config.get("visual"), Mapping):
            raise ConfigError(
                "config.json has no visual section: this is a text-only Qwen; run it with mlx-lm"
            )
        visual = from_dict(Visual, config["visual"], where="visual in config.json")
        tokenizer = QwenTokenizer.from_folder(folder, image_slots=visual.n_queries)
        if visual.image_start_id != tokenizer.id("<img>"):
            raise CheckpointError(
                f"<img> is {visual.image_start_id} in config.json and {tokenizer.id('<img>')} in the tokenizer: "
                "copy the tokenizer that belongs to this checkpoint"
            )
        path = folder / "generation_config.json"
        generation = read_json(path) if path.exists() else {}
        form = from_dict(ChatForm, generation, where=path.name)
        return cls(tokenizer, visual, form, _defaults(generation, tokenizer, form))

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: MediaOptions | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """As ``Processor``. ``template`` may give another ``max_window_size`` (tokens of history that are kept).

        Pictures are numbered over the whole conversation. Typed control tokens stay plain text. A conversation that
        ends with the assistant is continued. ``tools`` are described as ReAct text.
        """
        dialogue = read_dialogue(messages, tools or ())
        if self._form.chat_format == "raw":  # the base model was never shown a conversation
            return self._prompt(self._content([*dialogue.query, *dialogue.begun], SPECIALS), options)
        window = (template or {}).get("max_window_size", self._form.max_window_size)
        written = self._context(dialogue, window)
        written += self._content(dialogue.begun)
        return self._prompt(written, options)

    def raw(
        self,
        text: str,
        media: Sequence[Mapping[str, Any] | Media] = (),
        *,
        options: MediaOptions | None = None,
    ) -> Prompt:
        """As ``Processor``; the place of a picture is ``<img>…</img>``. Without ``media``, its path stands inside."""
        written = self._content([text], SPECIALS)
        if media:
            if len(written.pictures) != len(media):
                raise PromptError(
                    f"the text has {len(written.pictures)} places for {len(media)} pictures: "
                    "write <img></img> where each picture belongs"
                )
            written.pictures = [item if isinstance(item, Media) else _picture_of(item) for item in media]
        return self._prompt(written, options)

    def continuation(self, part: Mapping[str, Any], *, options: MediaOptions | None = None) -> Prompt:
        return self._prompt(self._content(read_content(part)), options)

    def boxes(self, text: str, prompt: Prompt) -> list[Box]:
        """The reference draws on the latest picture of the conversation: places are in its pixels."""
        sizes = [item.source_size for item in prompt.media]
        if not sizes or sizes[-1] is None:
            return []
        return tagged_boxes(text, sizes[-1], len(sizes) - 1)

    def _context(self, dialogue: Dialogue, window: int) -> Written:
        """ChatML: system, the latest turns that fit into ``window`` together with it, the question, an open answer."""
        newline = self._plain("\n")
        system = self._message("system", dialogue.system)
        kept: list[Written] = []
        room = window - len(system.ids)
        for question, answer in reversed(dialogue.turns):
            turn = Written(list(newline))
            turn += self._message("user", question)
            turn.ids += newline
            if answer is not None:
                turn += self._message("assistant", answer)
            room -= len(turn.ids)
            if room <= 0:
                break  # older ones go as well, even if they are shorter
            kept.append(turn)
        for turn in reversed(kept):
            system += turn
        system.ids += newline
        system += self._message("user", dialogue.query)
        system.ids += [*newline, self.tokenizer.im_start, *self._plain("assistant"), *newline]
        return system

    def _message(self, role: str, content: Content) -> Written:
        written = Written([self.tokenizer.im_start, *self._plain(role), *self._plain("\n")])
        written += self._content(content)
        written.ids.append(self.tokenizer.im_end)
        return written

    def _content(self, content: Content, specials: Sequence[str] = IMAGE_TAGS) -> Written:
        """What stands between control tokens, encoded by itself; paths between tags in a text are pictures as well."""
        written = Written()
        for item in _joined(content):
            written += self._picture(item) if isinstance(item, Picture) else self._text(item, specials)
        return written

    def _text(self, text: str, specials: Sequence[str]) -> Written:
        written = Written()
        for piece in split(normal_form(text), specials):
            if piece.kind == "image":
                written += self._picture(Picture(piece.text))
            else:
                written.ids += self.tokenizer.encode_piece(piece)
        return written

    def _picture(self, picture: Picture) -> Written:
        """Its slots hold its path as in the reference, where that fits; the features take their places all the same."""
        path = normal_form(picture.path)
        fits = len(path.encode()) <= self.tokenizer.image_slots - 2
        plain = not any(name in path for name in SPECIALS)
        return Written(self.tokenizer.encode_image(path if fits and plain else ""), [picture.source])

    def _prompt(self, written: Written, options: MediaOptions | None) -> Prompt:
        policy = (options or MediaOptions()).policy
        pictures = written.pictures
        return Prompt(written.ids, side_by_side(partial(self._cut, policy=policy), pictures, pictures))

    def _cut(self, source: Any, policy: FetchPolicy) -> Media:
        if isinstance(source, Media):
            return source
        if isinstance(source, str) and not source:
            raise PromptError("<img></img> names no picture: write its path inside, or give it as media")
        image = load_image(source, policy=policy)
        return square_image(image, size=self._visual.image_size, patch=self._visual.patch_size)

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode_content(text)


def _joined(content: Content) -> Iterator[str | Picture]:
    """Neighbouring texts as one: byte pairs merge across their border."""
    for is_text, run in itertools.groupby(content, key=lambda item: isinstance(item, str)):
        if is_text:
            yield "".join(map(str, run))
        else:
            yield from run


def _picture_of(part: Mapping[str, Any]) -> Any:
    [picture] = read_content(part)
    if not isinstance(picture, Picture):
        raise PromptError('media must be pictures: {"type": "image", "image": path}')
    return picture.source


def _defaults(generation: Mapping[str, Any], tokenizer: QwenTokenizer, form: ChatForm) -> GenerationDefaults:
    """In a chat an answer ends where the reference cuts its text: at either control token as well."""
    ends = {tokenizer.end_of_text}
    if form.chat_format == "chatml":
        ends |= {tokenizer.im_start, tokenizer.im_end}
    eos = generation.get("eos_token_id")
    ends |= set(eos) if isinstance(eos, list) else {eos} if isinstance(eos, int) else set()
    ends |= {words[0] for words in generation.get("stop_words_ids") or () if len(words) == 1}
    temperature = None
    if generation:
        temperature = generation.get("temperature") or 1.0 if generation.get("do_sample") else 0.0
    return GenerationDefaults(
        temperature=temperature,
        top_p=generation.get("top_p"),
        top_k=generation.get("top_k"),
        repetition_penalty=generation.get("repetition_penalty"),
        max_tokens=generation.get("max_new_tokens"),
        eos_token_ids=frozenset(ends),
    )
