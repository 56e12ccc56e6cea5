"""BTLM's tokenizer: GPT-2's byte-level BPE from the vocabulary files beside this one."""

from transformers import GPT2Tokenizer

from .architecture_btlm import BTLM_3B, END_OF_TEXT, TOKENIZER_FOLDER


def load_tokenizer() -> GPT2Tokenizer:
    """The tokenizer of the released model, with end-of-text as padding token so that batches can be padded."""
    return GPT2Tokenizer(
        vocab=str(TOKENIZER_FOLDER / "vocab.json"),
        merges=str(TOKENIZER_FOLDER / "merges.txt"),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=BTLM_3B.n_positions,
    )
