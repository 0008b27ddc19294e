"""The requests that the server takes. A field that is not named here is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Strict(BaseModel):
    """No unknown fields, no conversions: "0.7" is not a number."""

    model_config = ConfigDict(extra="forbid", strict=True)


Positive = Annotated[int, Field(ge=1, le=2**31)]
Pixels = Annotated[int, Field(ge=1, le=2**31)]
FramesPerSecond = Annotated[float, Field(gt=0, le=120)]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    """The guide's form: an URL, a data URI, or a path below an allowed folder."""

    type: Literal["image"]
    image: str
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class ImageURL(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImageURLPart(Strict):
    type: Literal["image_url"]
    image_url: ImageURL | str
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


Frames = Annotated[list[str], Field(min_length=1)]


class VideoPart(Strict):
    """A video file, or a list of frames with ``fps`` saying how they were sampled."""

    type: Literal["video"]
    video: str | Frames
    fps: FramesPerSecond | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


class VideoURL(Strict):
    url: str | Frames


class VideoURLPart(Strict):
    type: Literal["video_url"]
    video_url: VideoURL | str | Frames
    fps: FramesPerSecond | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None


MediaPart = ImagePart | ImageURLPart | VideoPart | VideoURLPart
Part = Annotated[TextPart | ImagePart | ImageURLPart | VideoPart | VideoURLPart, Field(discriminator="type")]


MOST = 10_000
"""Messages, and parts of a message: checking far more of them would keep everybody waiting."""


def _shape(value: Any) -> str:
    return "text" if isinstance(value, str) else "parts"


Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(max_length=MOST), Tag("parts")],
    Discriminator(_shape),
]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Field(max_length=MOST), Tag("parts")],
    Discriminator(_shape),
]


class Called(Strict):
    """A function that the model called. ``arguments``: JSON as text."""

    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Content


class UserMessage(Strict):
    role: Literal["user"]
    content: Content


class AssistantMessage(Strict):
    """An earlier answer, as this server gave it. ``boxes`` only repeat what the text says."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Called | None = None
    boxes: list[dict[str, Any]] | None = None
    refusal: None = None
    audio: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)


class ToolMessage(Strict):
    """What a tool gave back: text, or parts with pictures."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


class FunctionMessage(Strict):
    """The same in the older form; the reference asks for no name."""

    role: Literal["function"]
    content: Content
    name: str | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage | FunctionMessage,
    Field(discriminator="role"),
]


class Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class LegacyFunction(Strict):
    """An entry of ``functions``: OpenAI's, or the older Qwen form with names for model and human."""

    name: str | None = None
    description: str | None = None
    name_for_model: str | None = None
    name_for_human: str | None = None
    description_for_model: str | None = None
    parameters: dict[str, Any] | list[Any]


class FunctionName(Strict):
    name: str


class ToolChoice(Strict):
    type: Literal["function"]
    function: FunctionName


class JSONSchema(Strict):
    """``schema`` is enforced, whatever ``strict`` says. Name and description are notes: the model isn't shown them."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class TextFormat(Strict):
    type: Literal["text"]


class JSONObjectFormat(Strict):
    type: Literal["json_object"]


class JSONSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TemplateOptions(Strict):
    """Variables of the chat template that a caller may set."""

    enable_thinking: bool | None = None
    add_vision_id: bool | None = None


class Generation(Strict):
    """What chat and plain completions have in common. Null: as the model's generation_config.json says."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    user: str | None = Field(default=None, description="Written to the log at level debug, nothing else.")
    safety_identifier: str | None = Field(default=None, description="As user.")
    prompt_cache_key: str | None = Field(
        default=None, description="Not needed: what a prompt shares with earlier ones is found anyway."
    )


class ChatRequest(Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST)]
    max_completion_tokens: Positive | None = None
    max_length: Positive | None = Field(default=None, description="Prompt and answer together, in tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: list[LegacyFunction] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    fps: FramesPerSecond | None = None
    enable_thinking: bool | None = None
    reasoning_effort: Literal["none", "high"] | None = Field(
        default=None, description="Thinking off or on: these models know no steps between."
    )
    chat_template_kwargs: TemplateOptions | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=0)


TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]


class CompletionRequest(Generation):
    """POST /v1/completions: a text as it stands, without the chat template."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
