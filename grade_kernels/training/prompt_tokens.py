"""A prompt's tokens: what the tokenizer adds around a text, and what a chat template makes of messages."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

from transformers import PreTrainedTokenizerBase

from grade_kernels.training.positions import text_config

__all__ = [
    "MEDIA_COLUMNS",
    "TEMPLATE_COLUMNS",
    "Example",
    "Message",
    "Prompt",
    "PromptTokenizer",
    "beginning_of",
    "check_no_media",
    "check_template_arguments",
    "is_conversation",
    "prompt_text",
    "takes",
    "tokenizer_of",
]

logger = logging.getLogger(__name__)

Message = dict[str, Any]
"""A message of a conversation: its role, its content, and whatever else a chat template reads."""
Prompt = str | list[Message]
"""A text, or the messages of a conversation."""
Example = dict[str, Any]
"""A row of a data set: its prompt, and columns of any kind."""

# Columns that the chat template reads; rewards get them too, as all columns.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs", "documents")
# Columns by which data sets hand images and the like to a model.
MEDIA_COLUMNS = (
    *(name for what in ("image", "video", "audio") for name in (what, f"{what}s", f"{what}_url", f"{what}_urls")),
    "pixel_values", "pixel_values_videos", "input_features",
)  # fmt: skip
# What configurations call the token that stands for an image, a video or a sound.
_PLACEHOLDERS = tuple(f"{what}_token_{kind}" for what in ("image", "video", "audio") for kind in ("id", "index"))
# Arguments of apply_chat_template that users may not give: the trainer decides them, or they have no effect on prompts.
_DECIDED = (
    "conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors",
    "padding", "truncation", "max_length", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
)  # fmt: skip
_MARK = "GRADEPROBE"  # a text that no template writes by itself
_RARE = "\U00013000"  # the first hieroglyph, a letter that hardly any tokenizer has


def is_conversation(prompt: object) -> TypeGuard[list[Message]]:
    """Whether a prompt is a list of messages rather than a string."""
    return (
        isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)
    )


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a human reads it."""
    if not is_conversation(prompt):
        return str(prompt)
    return "\n".join(f"{m['role']}: {_joined(m.get('content') or '')}" for m in prompt)


def beginning_of(prompt: Prompt, length: int = 80) -> str:
    """The beginning of a prompt as errors quote it."""
    text = prompt_text(prompt)
    return repr(text if len(text) <= length else text[:length] + "...")


def tokenizer_of(processing_class: object, name: str = "processing_class") -> Any:
    """The tokenizer: of a processor its own, anything else as it is.

    Raises:
        TypeError: what is neither a tokenizer nor a processor with one, such as an image processor.
    """
    inner = getattr(processing_class, "tokenizer", None)
    # A tokenizer may have an attribute of that name too, which is its backend and no tokenizer of transformers.
    whole = inner is None or isinstance(processing_class, PreTrainedTokenizerBase)
    tokenizer = processing_class if whole else inner
    # Image processors and feature extractors are called as well, but have no vocabulary.
    if not callable(tokenizer) or (hasattr(tokenizer, "model_input_names") and not hasattr(tokenizer, "get_vocab")):
        raise TypeError(
            f"{name} must be a tokenizer or a processor that has one, got {type(processing_class).__name__}"
        )
    return tokenizer


def check_template_arguments(name: str, arguments: object) -> None:
    """Arguments of a chat template as a dict by name, none of which is decided here; TypeError or ValueError."""
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise TypeError(f"{name} must be a dict of arguments by name, got {arguments!r}")
    decided = sorted(arguments.keys() & set(_DECIDED))
    if decided:
        raise ValueError(
            f"{name} must hold arguments of the chat template, got {decided}, which the trainer decides: a prompt ends "
            "where the assistant speaks, or goes on if its message is the last"
        )


class PromptTokenizer:
    """Turns examples into the tokens that a policy goes on from.

    A string is tokenized as the tokenizer does it, but for two things that its post-processor may add: an end of
    sequence is cut off, and what the string begins with already (its BOS) is not put before it a second time. What the
    string itself holds stays, also an end of sequence at its own end. Messages go through the chat template, up to where
    the assistant speaks, or goes on if the last message is its own; nothing is added around what the template writes,
    except that the processor of a multimodal model puts its BOS before it where the template doesn't, as that processor
    does. Content that is a list of parts of text is joined for templates that read strings, and strings are made parts
    for those that read parts.

    Args:
        processing_class: the policy's tokenizer, or a processor with one.
        end_ids: all tokens that end a completion.
        template_arguments: for the chat template of every example. An example's own `chat_template_kwargs` come first.
        config: the policy's, whose placeholders of images and the like no prompt may hold.

    Raises:
        TypeError: no tokenizer.
    """

    def __init__(
        self,
        processing_class: Any,
        end_ids: Sequence[int] = (),
        template_arguments: Any = None,
        config: Any = None,
    ) -> None:
        self.tokenizer = tokenizer_of(processing_class)
        self._template_arguments = dict(template_arguments or {})
        processor = None if self.tokenizer is processing_class else processing_class
        self._processed = processor is not None
        template = getattr(processor, "chat_template", None)
        if template is not None:
            self._template_arguments.setdefault("chat_template", template)
        known = ("bos_token_id", "eos_token_id", "sep_token_id")
        self._bos, *ends = (getattr(self.tokenizer, name, None) for name in known)
        self._ends = {token for token in (*ends, *end_ids) if token is not None}
        self._placeholders = {} if config is None else _placeholders(config)
        self._drops_unknown: bool | None = None  # not tried yet
        self._structures: set[object] = set()  # of conversations that were doubted
        self._adds_nothing = not takes(self.tokenizer, "add_special_tokens")
        self._reads: dict[str, tuple[bool, bool]] = {}
        self._said: set[str] = set()

    def __call__(self, example: Example) -> list[int]:
        """An example's tokens, at least one.

        Args:
            example: with a `prompt`, and for messages perhaps `tools`, `chat_template_kwargs` and `documents`.

        Raises:
            TypeError: a prompt that is neither a string nor a list of messages, or a column of a wrong type.
            ValueError: a prompt without a token, messages without a template or that it does not take, or images.
        """
        prompt = example["prompt"]
        self.check(example)
        if isinstance(prompt, str):
            given = [name for name in ("tools", "chat_template_kwargs") if example.get(name)]
            if given or self._template_arguments.keys() - {"chat_template"}:
                self._say(
                    f"{', '.join(given) or 'chat_template_kwargs'}: without effect on prompts that are strings, which no "
                    "chat template reads"
                )
            ids = self._around(prompt)
        else:
            ids = self._conversation(example)
        if len(ids) == 0:
            raise ValueError(f"prompt {prompt!r} has no token; give it at least a beginning-of-sequence token")
        for token in self._placeholders.keys() & set(ids):
            raise ValueError(
                f"a prompt must be text alone, but one holds the model's {self._placeholders[token]} ({token}), which "
                f"stands for something that the replay does not carry; the prompt begins {beginning_of(prompt)}"
            )
        return list(ids)

    def check(self, example: Example) -> None:
        """The prompt is a string, or messages of text that there is a template for; TypeError or ValueError."""
        prompt = example["prompt"]
        if isinstance(prompt, str):
            return
        if not is_conversation(prompt):
            raise TypeError(f"a prompt must be a string or a list of messages, got {prompt!r}")
        check_no_media(prompt)
        self._arguments(example)

    def bound(self, example: Example) -> int:
        """About how many tokens an example has at most, without tokenizing it.

        No tokenizer makes more than one token of a byte of what it reads. A chat template is given credit for 1024 tokens
        of its own, and 64 for each message.
        """
        prompt = example["prompt"]
        if isinstance(prompt, str):
            return len(prompt.encode(errors="replace")) + 16
        others = [example.get(name) for name in TEMPLATE_COLUMNS]
        given = {key: value for key, value in self._template_arguments.items() if key != "chat_template"}
        return _bytes([prompt, others, given]) + 64 * len(prompt) + 1024

    def doubtful(self, example: Example) -> bool:
        """Whether `__call__` may refuse an example that `check` lets pass, as far as can be told without tokenizing it.

        It may have no token: it holds no letter and no digit, or the tokenizer drops what it does not know. It may hold a
        placeholder, whose text is in it. A chat template may not take it: no example of its structure came yet.
        """
        if self._drops_unknown is None:
            self._drops_unknown = self._tried_unknown()
        if self._drops_unknown:
            return True
        if not isinstance(example["prompt"], str):
            structure = _structure([example["prompt"], *(example.get(name) for name in TEMPLATE_COLUMNS)])
            if structure not in self._structures:
                self._structures.add(structure)
                return True
        texts = list(_strings([example["prompt"], *(example.get(name) for name in TEMPLATE_COLUMNS)]))
        prompt = example["prompt"]
        read = texts if isinstance(prompt, str) else [_joined(message.get("content") or "") for message in prompt]
        if not any(character.isalnum() for text in read for character in text):
            return True
        return any(written in text.casefold() for written in self._written_placeholders for text in texts)

    def may_reach(self, vocab_size: int) -> bool:
        """Whether the tokenizer has ids from `vocab_size` on, or does not tell which it has."""
        try:
            return bool(max(self.tokenizer.get_vocab().values(), default=0) >= vocab_size)
        except Exception:  # a function, or a vocabulary that is not at hand
            return True

    def _tried_unknown(self) -> bool:
        """Whether the tokenizer makes no token, or an error, of a letter that hardly any has."""
        try:
            _, own, behind = self._parts(_RARE)
            return not own and behind[:1] != [self._bos]
        except Exception:  # whatever the tokenizer's author let it be
            return True

    @functools.cached_property
    def _written_placeholders(self) -> list[str]:
        """How the placeholders are written; an empty string, which is in every text, where that can not be told."""
        written = []
        for token in self._placeholders:
            try:
                written.append(str(self.tokenizer.decode([token])).strip().casefold())
            except Exception:  # a token that the tokenizer lacks is in no text
                continue
        return written

    # ---------------------------------------------------------------------------------------------------- plain text

    def _around(self, text: str) -> list[int]:
        """A text's tokens with what the tokenizer adds before it, if the text does not begin with that itself."""
        before, own, behind = self._parts(text)
        doubled = next((n for n in range(len(before), 0, -1) if before[-n:] == own[:n]), 0)
        if doubled == 0 and own[:1] == [self._bos] and self._bos in before:
            own, doubled = own[1:], 1  # something stands between the two
        elif doubled:
            before = before[:-doubled]
        if doubled:
            self._say(
                "prompts that begin with a beginning of sequence are left with one: the tokenizer adds another, which is "
                "not taken"
            )
        start = 1 if not own and not before and behind[:1] == [self._bos] else 0
        end = next((i for i in range(start, len(behind)) if behind[i] in self._ends), len(behind))
        if end < len(behind):
            self._say(
                f"the tokenizer ends every text with {behind[end:]} (an end of sequence), which is cut off prompts: the "
                "policy shall go on from there"
            )
        return before + own + behind[:end]

    def _parts(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """What the tokenizer adds before a text, the text's own tokens, and what it adds behind."""
        full = list(self.tokenizer(text)["input_ids"])
        if self._adds_nothing:
            return [], full, []
        own = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not own:
            return [], [], full
        # The text's own tokens may occur twice in the whole, when the text begins with a BOS like the one that is added.
        # The search goes from the right, so that the added one is taken for the first.
        for start in range(len(full) - len(own), -1, -1):
            if full[start : start + len(own)] == own:
                if start and self._bos not in full[:start] and full[: len(own)] == own and full[len(own)] in self._ends:
                    start = 0  # the text is made of ends alone, and the tokenizer added one more behind it
                return full[:start], own, full[start + len(own) :]
        # With special tokens around it the text has other tokens than alone, so what was added can not be told from it.
        # Only an end of sequence can: it is the last token, and the text alone does not end with it.
        own_end = len(full) - (full[-1:] != own[-1:] and full[-1] in self._ends)
        return [], full[:own_end], full[own_end:]

    # -------------------------------------------------------------------------------------------------- conversations

    def _conversation(self, example: Example) -> list[int]:
        messages = [_uniform(_without_none(message)) for message in example["prompt"]]
        tools, arguments = self._arguments(example)
        template = arguments["chat_template"]
        ignored = [
            name
            for name in [*(["tools"] if tools else []), *arguments]
            if name not in template and name not in ("chat_template", "sanitize_control_tokens")
        ]
        if ignored:
            self._say(f"the chat template does not mention {', '.join(ignored)}, so they have no effect")
        begun = messages[-1]["role"] == "assistant"
        try:
            messages = self._as_read(messages, arguments)
            rendered = self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=not begun, continue_final_message=begun,
                tokenize=not self._processed, **({} if self._processed else {"return_dict": True}), **arguments,
            )  # fmt: skip
        except Exception as error:
            raise ValueError(
                f"the chat template fails: {type(error).__name__}: {error}; the prompt begins "
                f"{beginning_of(example['prompt'])}"
            ) from error
        if not self._processed:
            return list(rendered["input_ids"])
        bos = getattr(self.tokenizer, "bos_token", None)
        if bos is not None and rendered.startswith(bos):  # then processors add nothing
            return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return self._around(rendered)

    def _arguments(self, example: Example) -> tuple[Any, dict[str, Any]]:
        """An example's tools, and all else that its chat template gets, the template itself among it."""
        own = _column(example, "chat_template_kwargs", dict) or {}
        check_template_arguments("column chat_template_kwargs", own)
        arguments = {**self._template_arguments, **own}
        others = arguments.pop("tools", None)
        # For an empty list of tools, templates of the Llama family write an introduction to tools; for None they do not.
        tools = _column(example, "tools", list) or others or None
        template = arguments["chat_template"] = self._template(arguments, tools, example["prompt"])
        if example.get("documents") and "documents" in template:
            arguments["documents"] = _column(example, "documents", list)
        return tools, arguments

    def _template(self, arguments: dict[str, Any], tools: Any, prompt: Any) -> str:
        """The chat template of some arguments, or ValueError."""
        given = arguments.get("chat_template")
        if not hasattr(self.tokenizer, "get_chat_template"):
            template = given or getattr(self.tokenizer, "chat_template", None)
        elif given is None and not getattr(self.tokenizer, "chat_template", None):
            template = None
        elif isinstance(given, dict):  # a processor's templates by name
            template = given.get("tool_use" if tools and "tool_use" in given else "default")
        else:
            template = self.tokenizer.get_chat_template(given, tools)
        if not template:
            raise ValueError(
                "prompts that are lists of messages need a chat template, but the tokenizer has none: set its "
                "chat_template, or give prompts that are strings; the prompt begins " + beginning_of(prompt)
            )
        return template

    def _as_read(self, messages: list[Message], arguments: dict[str, Any]) -> list[Message]:
        """Messages with their content as the template reads it: strings, or lists of parts."""
        template = arguments["chat_template"]
        if template not in self._reads:
            self._reads[template] = (
                self._tried(arguments, _MARK),
                self._tried(arguments, [{"type": "text", "text": _MARK}]),
            )
        strings, parts = self._reads[template]
        if strings == parts:
            return messages
        read: list[Message] = []
        for message in messages:
            content = message.get("content")
            if strings and isinstance(content, (list, tuple)):
                message = {**message, "content": _joined(content)}
            elif parts and isinstance(content, str):
                message = {**message, "content": [{"type": "text", "text": content}]}
            read.append(message)
        return read

    def _tried(self, arguments: dict[str, Any], content: object) -> bool:
        """Whether a template writes the text of a message with such content, and not Python's view of it."""
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, **arguments
            )
        except Exception:
            return False
        return _MARK in text and f"'{_MARK}'" not in text and f'"{_MARK}"' not in text

    def _say(self, message: str) -> None:
        """A warning, once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message)


def check_no_media(prompt: Any) -> None:
    """Messages whose content is text alone, or ValueError naming what else is in them."""
    for message in prompt:
        content = message.get("content")
        if beside := [name for name in MEDIA_COLUMNS if message.get(name)]:
            content = [{"type": beside[0]}]
        if isinstance(content, dict):
            content = [content]
        for part in content if isinstance(content, (list, tuple)) else ():
            if isinstance(part, str):
                continue
            if not isinstance(part, dict):
                raise TypeError(f"a part of a message must be a dict or a string, got {part!r}")
            kind = part.get("type", "text")
            others = [key for key, value in part.items() if value is not None and key not in ("type", "text")]
            media = [key for key in others if key.split("_")[0] in ("image", "video", "audio", "input")]
            if kind not in ("text", None) or media:
                raise ValueError(
                    f"a prompt must be text alone, but a message has a part of type {media[0] if kind == 'text' else kind!r}:"
                    f" images, videos and sounds are not carried through the replay; the prompt begins {beginning_of(prompt)}"
                )


def _placeholders(config: object) -> dict[int, str]:
    """Tokens that stand for an image, a video or a sound, by id."""
    if text_config(config) is config and not any(hasattr(config, f"{what}_config") for what in ("vision", "audio")):
        return {}
    found = {name: getattr(config, name, None) for name in _PLACEHOLDERS}
    return {token: name for name, token in found.items() if isinstance(token, int)}


def takes(function: Callable[..., object], name: str) -> bool:
    """Whether a callable has an argument of that name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _column(example: Example, name: str, kind: type) -> Any:
    """A column of an example, read from JSON where it is a string, without the nulls that Arrow fills in."""
    value = example.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"column {name} must be a {kind.__name__} or JSON of one, got {value!r}: {error}"
            ) from error
    if isinstance(value, tuple):
        value = list(value)
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"column {name} must be a {kind.__name__}, JSON of one or None, got {value!r}")
    return _without_none(value)


def _without_none(value: object) -> Any:
    """A structure without the dict entries that are None, which Arrow fills in where other rows have some."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, (list, tuple)) else value


def _uniform(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content, where it is a list, is a list of parts that say what they are."""
    content = message.get("content")
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, (list, tuple)):
        return message
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "text", **part} for part in content]
    return {**message, "content": parts}


def _joined(content: object) -> str:
    """Content as one string: parts of text one behind the other, as templates that read parts write them."""
    if not isinstance(content, (list, tuple)):
        return str(content)
    return "".join(part if isinstance(part, str) else str(part.get("text") or "") for part in content)


def _structure(value: object, key: str | None = None) -> object:
    """What a chat template may stumble over: keys, kinds, and roles, but no other text."""
    if isinstance(value, dict):
        return tuple((name, _structure(item, name)) for name, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return list, tuple(_structure(item) for item in value)
    return value if key in ("role", "type") and isinstance(value, str) else type(value)


def _bytes(value: object) -> int:
    """Bytes of all that is in a structure, as JSON would about have it."""
    return sum(len(text.encode(errors="replace")) + 8 for text in _strings(value))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
    elif value is not None:
        yield str(value)
