"""What a request in OpenAI's format asks: its JSON becomes a conversation, a picture and settings.

What LLaVA-1.5 was trained on decides what a conversation may be:
- at most one picture, in the first question, before its words (`image_url`: a data URI, or a public address; its
  `detail` has no effect, since CLIP sees one size);
- questions and answers in turn, a question last. Questions that follow each other directly are one, in lines;
- it has one system prompt, its own. A system message comes before the first question, as a paragraph of it.
Without `temperature` the likeliest words are taken. A field that would change the answer, and cannot here, is refused.
"""

import itertools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from PIL.Image import Image

from data.conversation import Turn
from data.web import is_url
from demo.pictures import fetch, read_data_uri
from demo.service import Service
from demo.voice import Settings, Voice
from model.sampling import Sampling

DEFAULT_NEW_TOKENS = 512
MAX_MESSAGES = 1000  # each is some tokens, whatever its text: more fit into no model
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 100  # an answer is searched for all their beginnings after every token
MAX_URL_CHARACTERS = 2000

USED = {
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens",
    "stop", "seed",
}  # fmt: skip
WITHOUT_EFFECT = {
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "parallel_tool_calls",
}  # fmt: skip
# What these do is not done here; with these values, or null, they ask for nothing.
ASK_FOR_NOTHING: Mapping[str, Sequence[object]] = {
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "store": (False,), "response_format": ({"type": "text"},), "modalities": (["text"],),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "audio": (), "prediction": (), "web_search_options": (),
}  # fmt: skip
SPEAKERS = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
KINDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class RequestError(ValueError):
    """A request that is refused: the HTTP status, and the fields of OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True)
class Question:
    """What is asked, of whom, and how the answer is to come."""

    voice: Voice
    turns: Sequence[Turn]
    picture: Image | None
    settings: Settings
    is_stream: bool
    has_usage: bool  # of a stream: it ends with the number of tokens


@dataclass(frozen=True)
class _Message:
    speaker: str
    text: str
    urls: Sequence[str]


def read_question(body: bytes | bytearray, service: Service) -> Question:
    """Read a request, its picture included, which may have to be fetched. Raises: ValueError."""
    try:
        # Unlike Python's own, this reader refuses NaN, half characters and deep nesting.
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if type(fields) is not dict:
        raise RequestError("the body is not a JSON object")
    _refuse_unknown(fields)
    voice = find_voice(_read(fields, "model", str, is_needed=True), service)
    is_stream = _read(fields, "stream", bool) or False
    options = _read(fields, "stream_options", dict) or {}
    if options and not is_stream:
        raise RequestError("stream_options are for stream: true only", "stream_options")
    settings = _read_settings(fields, service.max_new_tokens)
    turns, url = _read_conversation(_read(fields, "messages", list, is_needed=True))
    picture = None if url is None else _open_picture(url)  # last: it costs most
    return Question(voice, turns, picture, settings, is_stream, _read(options, "include_usage", bool) or False)


def find_voice(name: str, service: Service) -> Voice:
    """Return the voice that a client calls a model. Raises: RequestError."""
    try:
        return service.find(name[:200])
    except ValueError as error:
        raise RequestError(str(error), "model", "model_not_found", 404) from error


def _refuse_unknown(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if name in USED or name in WITHOUT_EFFECT or value is None:
            continue
        if name not in ASK_FOR_NOTHING:
            raise RequestError(f"{name[:50]!r} is not known here: leave it out", name[:50], "unknown_parameter")
        if value not in ASK_FOR_NOTHING[name]:
            raise RequestError(
                f"{name!r} is not supported here with another value than its default: leave it out", name,
                "unsupported_value",
            )  # fmt: skip


def _read(fields: Mapping[str, Any], name: str, *kinds: type, is_needed: bool = False, where: str = "") -> Any:
    """Return a field, None where it is null or missing. Raises: RequestError for one of another type."""
    value = fields.get(name)
    if value is None and not is_needed:
        return None
    if type(value) not in kinds:  # isinstance would take true for the number 1
        found = "missing" if value is None else f"{KINDS.get(type(value))}"
        raise RequestError(f"{where}{name}: expected {KINDS[kinds[-1]]}, it is {found}", f"{where}{name}")
    return value


def _read_settings(fields: Mapping[str, Any], max_new_tokens: int) -> Settings:
    length = _read(fields, "max_completion_tokens", int)
    length = _read(fields, "max_tokens", int) if length is None else length
    if length is None:
        length = min(DEFAULT_NEW_TOKENS, max_new_tokens)
    temperature, top_p = (_read(fields, name, int, float) for name in ("temperature", "top_p"))
    seed = _read(fields, "seed", int)
    sampling = Sampling(
        0.0 if temperature is None else float(temperature),
        1.0 if top_p is None else float(top_p),
        secrets.randbelow(2**62) if seed is None else seed,
    )
    return Settings(length, sampling, _read_stops(fields))


def _read_stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    stops = _read(fields, "stop", list, str)
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if len(stops) > MAX_STOPS or not all(type(stop) is str and 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise RequestError(
            f"stop: expected a text of 1 to {MAX_STOP_CHARACTERS} characters, or a list of up to {MAX_STOPS}", "stop"
        )
    return tuple(stops)


def _read_conversation(messages: Sequence[Any]) -> tuple[list[Turn], str | None]:
    """Return the turns, and where the picture is that belongs to the first."""
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"{len(messages)} messages, the limit is {MAX_MESSAGES}", "messages")
    said = [_read_message(message, f"messages[{number}]") for number, message in enumerate(messages)]
    orders = list(itertools.takewhile(lambda message: message.speaker == "system", said))
    groups = [list(group) for _, group in itertools.groupby(said[len(orders) :], lambda message: message.speaker)]
    for number, group in enumerate(groups):
        expected = ("human", "gpt")[number % 2]
        if group[0].speaker == "system":
            raise RequestError("a system message has to come before the first user message", "messages")
        if group[0].speaker != expected or (expected == "gpt" and len(group) > 1):
            raise RequestError("user and assistant have to take turns, the user first", "messages")
    if len(groups) % 2 == 0:
        raise RequestError("the last message has to be the user's: it is what is answered", "messages")
    urls = [url for message in said for url in message.urls]
    if len(urls) > 1:
        raise RequestError(f"{len(urls)} pictures, LLaVA-1.5 was trained with one a conversation", "messages")
    if len(urls) > sum(len(message.urls) for message in groups[0]):
        raise RequestError("the picture has to be in the first user message, as in LLaVA-1.5's training", "messages")
    texts = ["\n".join(message.text for message in group) for group in groups]
    texts[0] = "\n\n".join([*(order.text for order in orders), texts[0]])
    turns = [
        Turn("gpt" if number % 2 else "human", text, has_image=number == 0 and bool(urls))
        for number, text in enumerate(texts)
    ]
    return turns, urls[0] if urls else None


def _read_message(message: object, where: str) -> _Message:
    if not isinstance(message, dict):
        raise RequestError(f"{where}: expected an object", where)
    role = _read(message, "role", str, is_needed=True, where=f"{where}.")
    if role not in SPEAKERS:
        raise RequestError(f"{where}.role: expected one of {', '.join(SPEAKERS)}", f"{where}.role")
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):  # what clients send back of an answer
            raise RequestError(f"{where}: {name[:50]!r} is not supported", where, "unknown_parameter")
    content = _read(message, "content", list, str, is_needed=True, where=f"{where}.")
    if isinstance(content, str):
        return _Message(SPEAKERS[role], content, [])
    texts, urls = [], []
    for number, part in enumerate(content):
        place = f"{where}.content[{number}]"
        if not isinstance(part, dict) or part.get("type") not in ("text", "image_url"):
            raise RequestError(f"{place}: expected an object whose type is text or image_url", place)
        if part["type"] == "text":
            texts.append(_read(part, "text", str, is_needed=True, where=f"{place}."))
        else:
            image = _read(part, "image_url", dict, is_needed=True, where=f"{place}.")
            urls.append(_read(image, "url", str, is_needed=True, where=f"{place}.image_url."))
    return _Message(SPEAKERS[role], "\n".join(texts), urls)


def _open_picture(url: str) -> Image:
    try:
        if not is_url(url[:MAX_URL_CHARACTERS]):
            return read_data_uri(url)
        if len(url) > MAX_URL_CHARACTERS:
            raise ValueError(f"the address has {len(url)} characters, the limit is {MAX_URL_CHARACTERS}")
        return fetch(url)
    except ValueError as error:
        raise RequestError(str(error), "messages", "invalid_image") from error
