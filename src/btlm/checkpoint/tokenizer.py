"""The tokenizer of a checkpoint: as the `tokenizers` library reads it, without torch, or as Transformers does."""

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from btlm.console import one_line
from btlm.model.architecture_btlm import VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from btlm.model import BTLMConfig


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The ``tokenizer.json`` of a folder; None if there is none or it cannot be read."""
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises bare exceptions; Transformers' reader below names the problem
        return None


def load_transformers_tokenizer(folder: Path, config: "BTLMConfig", name: Path | str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder; that of GPT-2 where it has none but that vocabulary size.

    Raises:
        ValueError: There is none, or it does not fit the vocabulary.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer

    from btlm.model.tokenization_btlm import load_tokenizer

    files = {file for file in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / file).is_file()}
    tokenizer: PreTrainedTokenizerBase
    try:
        if "tokenizer.json" in files:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
        elif {"vocab.json", "merges.txt"} <= files:
            tokenizer = GPT2Tokenizer.from_pretrained(folder, local_files_only=True)
        elif config.vocab_size == VOCAB_SIZE:
            return load_tokenizer()
        else:
            raise FileNotFoundError(
                f"there is no tokenizer.json, and with a vocabulary of {config.vocab_size:,} it is not GPT-2's"
            )
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise ValueError(
            f"{name}: its tokenizer cannot be loaded ({one_line(error)}); put the right one beside the weights."
        ) from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer of {name} has {len(tokenizer):,} tokens, and its model a vocabulary of "
            f"{config.vocab_size:,}; they do not belong together."
        )
    if tokenizer.eos_token is None and isinstance(config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
