"""Masks that make a text JSON, JSON by a schema, a match of a regular expression, or one of some choices."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from btlm.engine.cache import common_prefix
from btlm.engine.sampling import Mask

from .errors import invalid
from .schema import Sampling

# Between two parts of JSON. Without a limit, a model that likes blanks could write them for ever.
_WHITESPACE = " ?"
# What a grammar may cost, so that one of them cannot stop the texts of others for seconds.
_LIMITS = LLParserLimits(initial_lexer_fuel=50_000, step_lexer_fuel=10_000)
_MOST_TRIES = 64  # parts of a schema that are compiled to find the one that cannot be


class Grammars:
    """Compiles what requests ask for.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: Number of its tokens.
        end_ids: Tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._vocab_size, self._end_ids, self._tries = vocab_size, end_ids, 0
        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=list(end_ids))

    def mask(self, asked: Sampling) -> Callable[[], Mask]:
        """What makes the masks of the texts of a request that asks for a form.

        Raises:
            ApiError: Two forms are asked for, or one that cannot be compiled; the message says where.
        """
        given, form = asked.forms, asked.response_format
        if len(given) > 1:
            raise invalid(given[1], f"{' and '.join(given)} exclude each other; give one of them.")
        if not self._end_ids:
            raise invalid(given[0], f"{given[0]} needs a token that ends a text, and this model has none.")
        if asked.guided_regex is not None:
            matcher = self._compile(LLMatcher.grammar_from_regex(asked.guided_regex), "guided_regex")
        elif asked.guided_choice is not None:
            choices = "|".join(f"({re.escape(choice)})" for choice in asked.guided_choice)
            matcher = self._compile(LLMatcher.grammar_from_regex(choices), "guided_choice")
        else:
            assert form is not None
            schema: dict[str, Any] = {"type": "object"}
            if form.type == "json_schema":
                if form.json_schema is None:
                    raise invalid(
                        "response_format.json_schema", "The type json_schema needs a schema; add json_schema."
                    )
                schema = form.json_schema.json_schema
            matcher = self._compile_schema(schema)
        first = GrammarMask(matcher.deep_copy(), self._vocab_size, self._end_ids)
        if not first([]).any():
            raise invalid(given[0], f"{given[0]} is too complex, or fits no text.")
        return lambda: GrammarMask(matcher.deep_copy(), self._vocab_size, self._end_ids)

    def _compile(self, grammar: str, param: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise invalid(param, f"{param} cannot be used: {_first_lines(matcher.get_error())}.")
        return matcher

    def _compile_schema(self, schema: dict[str, Any]) -> LLMatcher:
        matcher, problem = self._try_schema(schema)
        if problem:
            self._tries = _MOST_TRIES
            place, problem = self._where(schema, problem, schema)
            raise invalid(
                "response_format.json_schema.schema", f"The schema cannot be used: at {place or 'its root'}, {problem}."
            )
        assert matcher is not None
        return matcher

    def _try_schema(self, schema: dict[str, Any]) -> tuple[LLMatcher | None, str]:
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), defaults={"whitespace_pattern": _WHITESPACE}
            )
        except (ValueError, RecursionError) as error:
            return None, str(error)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        return matcher, _first_lines(matcher.get_error())

    def _where(self, schema: dict[str, Any], problem: str, root: dict[str, Any]) -> tuple[str, str]:
        """The JSON pointer of the innermost schema that cannot be used, and why it cannot."""
        shared: dict[str, Any] = {key: root[key] for key in ("$defs", "definitions") if key in root}
        for place, inner in _parts(schema):
            self._tries -= 1
            if self._tries < 0:
                break
            _, inner_problem = self._try_schema({**shared, **inner})
            if inner_problem:
                rest, found = self._where(inner, inner_problem, root)
                return place + rest, found
        return "", problem


class GrammarMask:
    """Which tokens may follow those that were written.

    Args:
        matcher: At its beginning.
        vocab_size: Number of tokens.
        end_ids: Tokens that end a text.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._matcher, self._vocab_size, self._end_ids = matcher, vocab_size, end_ids
        self._read: list[int] = []

    def __call__(self, written: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Whether each token may follow."""
        if written and written[-1] in self._end_ids:  # only where ends are guessed, or ignored
            ends = np.zeros(self._vocab_size, bool)
            ends[self._end_ids] = True
            return ends
        kept = common_prefix(self._read, written)
        if kept < len(self._read):  # a guess was wrong
            self._matcher.rollback(len(self._read) - kept)
        self._matcher.consume_tokens(list(written[kept:]))
        self._read = list(written)
        try:
            mask = self._matcher.compute_bitmask()
        except ValueError:  # a limit of the library was reached
            mask = b""
        if self._matcher.is_error() or not mask:  # nothing is allowed, so that the request ends with an error
            return np.zeros(self._vocab_size, bool)
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        return bits[: self._vocab_size].view(bool)


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas in a schema, with their JSON pointers."""
    for key in ("$defs", "definitions", "properties", "patternProperties"):
        for name, inner in _items(schema.get(key)):
            yield f"/{key}/{name}", inner
    for key in ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames"):
        if isinstance(schema.get(key), dict):
            yield f"/{key}", schema[key]
    for key in ("prefixItems", "anyOf", "oneOf", "allOf"):
        for name, inner in _items(dict(enumerate(schema[key])) if isinstance(schema.get(key), list) else None):
            yield f"/{key}/{name}", inner


def _items(mapping: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, inner in mapping.items() if isinstance(mapping, dict) else ():
        if isinstance(inner, dict):
            yield str(name), inner


def _first_lines(problem: str) -> str:
    """What is wrong, without the grammar that it is shown in."""
    lines = [line for line in problem.splitlines() if not re.match(r"\s*\d+ \||\s*\^*\s*$", line)]
    return " ".join(" ".join(lines).split()).rstrip(".")[:300]
