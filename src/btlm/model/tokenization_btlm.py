"""BTLM's tokenizer: GPT-2's byte-level BPE with 50,257 tokens, from the vocabulary files beside this one."""

from pathlib import Path

from transformers import GPT2Tokenizer

VOCABULARY = Path(__file__).parent / "tokenizer"
VOCABULARY_SIZE = 50257
END_OF_TEXT = "<|endoftext|>"


def load_tokenizer() -> GPT2Tokenizer:
    """The tokenizer of the released model, with end-of-text as padding token so that batches can be padded."""
    return GPT2Tokenizer(
        vocab=str(VOCABULARY / "vocab.json"),
        merges=str(VOCABULARY / "merges.txt"),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=8192,
    )
