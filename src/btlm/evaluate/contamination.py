"""How many questions of benchmarks occur in training text, by the word n-grams that `btlm data` removes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from btlm.data.minhash import normalize, shingle_hashes
from btlm.data.mix import texts_in
from btlm.data.recipe import Mix
from btlm.data.shards import TokenShards
from btlm.model.architecture_btlm import END_OF_TEXT_ID

WORDS = Mix.decontaminate_words
_CHUNK = 2**20  # tokens that are read at a time
_OVERLAP = 256  # tokens that are read twice, so that no n-gram is cut

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Contamination:
    """What training text has of the questions of a task.

    Args:
        found: Questions that share an n-gram with it.
        checked: Questions that are long enough to have an n-gram.
        questions: All questions.
    """

    found: int
    checked: int
    questions: int


def contamination(
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    shards: Path | str,
    tokenizer: Tokenizer,
    *,
    words: int = WORDS,
    on_tokens: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Contamination]:
    """Look for the questions of tasks in the training split of token shards.

    Args:
        tasks: The questions of each task, as the rows of its data; all their texts count, answers included.
        shards: Folder of token shards.
        tokenizer: Tokenizer of the shards.
        words: Words of an n-gram.
        on_tokens: Called with the number of tokens that were read since the last call, and that of all tokens.

    Raises:
        ValueError: The folder has no whole shards.
    """
    of_question = {name: [_ngrams(question, words) for question in questions] for name, questions in tasks.items()}
    parts = [hashes for questions in of_question.values() for hashes in questions]
    wanted: _Hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))
    seen = np.zeros(len(wanted), bool)
    for text in _texts(TokenShards(shards, verify=False), tokenizer, on_tokens):
        for hashes in shingle_hashes(normalize(text), "words", words):
            places = np.searchsorted(wanted, hashes)
            there = wanted.take(places, mode="clip") == hashes if len(wanted) else np.zeros(len(hashes), bool)
            seen[places[there]] = True
    found: dict[str, Contamination] = {}
    for name, questions in of_question.items():
        hits = sum(bool(seen[np.searchsorted(wanted, hashes)].any()) for hashes in questions)
        found[name] = Contamination(hits, sum(len(hashes) > 0 for hashes in questions), len(questions))
    return found


def _ngrams(question: Mapping[str, Any], words: int) -> _Hashes:
    parts = [hashes for text in texts_in(dict(question)) for hashes in shingle_hashes(normalize(text), "words", words)]
    return np.concatenate([np.empty(0, np.uint64), *parts])


def _texts(shards: TokenShards, tokenizer: Tokenizer, on_tokens: Callable[[int, int], object]) -> Iterator[str]:
    """The training text in pieces that overlap."""
    total = shards.num_tokens("train")
    end = str(tokenizer.id_to_token(END_OF_TEXT_ID))
    for start in range(0, total, _CHUNK):
        tokens = shards.tokens("train", start, _CHUNK + _OVERLAP)
        text: str = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        yield text.replace(end, f" {end} ")  # a word of its own, so that no n-gram goes from one document to the next
        on_tokens(min(_CHUNK, total - start), total)
