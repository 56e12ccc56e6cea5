"""Requests of the API and what they may hold. Answers are made in :mod:`completions` and :mod:`chat`."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_ALTERNATIVES = 20
MOST_CHOICES = 128
_MOST_STOPS = 16
_MOST_ITEMS = 1024  # of lists that a person could write
_MOST_IDS = 2**18
_LARGEST_SEED = 2**63 - 1

Id = Annotated[int, Field(ge=0, lt=2**31)]


def _is_unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold halves of surrogate pairs
        raise ValueError(f"is no Unicode text (character {error.start})") from None
    return text


Text = Annotated[str, AfterValidator(_is_unicode)]
SomeText = Annotated[str, Field(min_length=1), AfterValidator(_is_unicode)]
# Validation stops at the first mistake, since a body of megabytes can hold a million.
Ids = Annotated[list[Id], Field(min_length=1, max_length=_MOST_IDS, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_is_unicode)]
Bias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
]


def _off(value: Any) -> Any:
    if value:
        raise ValueError("is not supported; leave it out")
    return value


Off = Annotated[Any, AfterValidator(_off)]


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="A last chunk has the numbers of tokens.")
    continuous_usage_stats: bool = Field(False, description="Every chunk has the numbers of tokens so far.")


class JsonSchema(BaseModel):
    """A schema with a name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = "answer"
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What a text has to be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(BaseModel):
    """What the two kinds of completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="Name of the model; the server has one.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the most probable token; 1 by default.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_LARGEST_SEED, description="-1 or 0 for all tokens.")
    seed: int | None = Field(None, ge=-(2**63), le=_LARGEST_SEED, description="Choice number i is drawn with seed + i.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.001, le=1000)
    logit_bias: Bias | None = Field(None, description="Numbers that are added to logits, by token id.")
    stop: StopText | Annotated[list[StopText], Field(max_length=_MOST_STOPS, fail_fast=True)] | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(None, description="Write on after the end of the text.")
    return_token_ids: bool | None = Field(None, description="Tell the ids of tokens, too, as vLLM does.")
    response_format: ResponseFormat | None = None
    guided_regex: SomeText | None = Field(None, max_length=10_000, description="The text has to match this.")
    guided_choice: Annotated[list[SomeText], Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)] | None = (
        Field(None, description="The text has to be one of these.")
    )
    min_p: Off = Field(None, description="Not supported.")
    user: Any = Field(None, description="Not used.")
    metadata: Any = Field(None, description="Not used.")
    prompt_cache_key: Any = Field(None, description="Not used.")
    safety_identifier: Any = Field(None, description="Not used.")
    service_tier: Any = Field(None, description="Not used.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Some clients send null for what they do not use, also where the server does not know it."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    @property
    def forms(self) -> list[str]:
        """Names of the fields that say what the text has to be."""
        form = self.response_format is not None and self.response_format.type != "text"
        given = {
            "response_format": form,
            "guided_regex": self.guided_regex is not None,
            "guided_choice": self.guided_choice is not None,
        }
        return [name for name, wanted in given.items() if wanted]

    @property
    def stops(self) -> list[str]:
        """The texts that end a continuation."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def seed_of_first(self) -> int | None:
        """The seed, as one that is not negative."""
        return None if self.seed is None else self.seed % 2**63


class CompletionRequest(Sampling):
    """A request for `/v1/completions`."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)]
        | None
    ) = Field(None, description="A text, its token ids, or several of either; an empty one is the beginning of a text.")
    max_tokens: int | None = Field(None, ge=0, le=_LARGEST_SEED, description="16 by default; 0 writes nothing.")
    best_of: int | None = Field(
        None, ge=1, le=MOST_CHOICES, description="Number of candidates, of which those most probable per token count."
    )
    echo: bool | None = Field(None, description="The text begins with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="Number of alternatives that are told beside each token."
    )
    suffix: Off = Field(None, description="Not supported.")


class ContentPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[ContentPart], Field(max_length=_MOST_ITEMS, fail_fast=True)]

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampling):
    """A request for `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, le=_LARGEST_SEED, description="What the context leaves by default.")
    max_completion_tokens: int | None = Field(None, ge=1, le=_LARGEST_SEED, description="Another name of max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    tools: Off = Field(None, description="Not supported.")
    tool_choice: Literal["none", "auto"] | None = Field(None, description="Without effect, since there are no tools.")
    parallel_tool_calls: Any = Field(None, description="Not used.")
    functions: Off = Field(None, description="Not supported.")
    store: Off = Field(None, description="Not supported.")


class TokenizeRequest(BaseModel):
    """A request for `/tokenize`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """A request for `/detokenize`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: Annotated[list[Id], Field(max_length=_MOST_IDS, fail_fast=True)]


# Answers, for the description of the API


class _Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorDetail(_Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(_Answer):
    """An error."""

    error: ErrorDetail


class Usage(_Answer):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(_Answer):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(_Answer):
    """The answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class ChatChoice(_Answer):
    """One answer of a conversation."""

    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class ChatAnswer(_Answer):
    """The answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    warning: str


class TokenizeAnswer(_Answer):
    """The answer of `/tokenize`."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeAnswer(_Answer):
    """The answer of `/detokenize`."""

    prompt: str


class Models(_Answer):
    """The answer of `/v1/models`."""

    object: Literal["list"]
    data: list[dict[str, Any]]
