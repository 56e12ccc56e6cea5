from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Tokenizer

from btlm.model.tokenization_btlm import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return load_tokenizer()


# Ids of GPT-2's published vocabulary.
KNOWN = {
    "Hello world": [15496, 995],
    " world": [995],
    "The quick brown fox": [464, 2068, 7586, 21831],
    "!": [0],
    "\n": [198],
    " ": [220],
    "<|endoftext|>": [50256],
    "": [],
}


@pytest.mark.parametrize("text", KNOWN)
def test_ids_of_gpt2(text: str, tokenizer: GPT2Tokenizer) -> None:
    assert tokenizer(text)["input_ids"] == KNOWN[text]
    assert tokenizer.decode(KNOWN[text]) == text


@pytest.mark.parametrize(
    "text",
    [
        "naïve café — “quotes” … ½",
        "日本語のテキスト and 한국어, русский, العربية",
        "👩‍👩‍👧‍👦 emoji 🏳️‍🌈 and \u0301 combining",
        "tabs\tand\r\nlines\n\n\n   spaces  trailing   ",
        "def f(x):\n    return x ** 2  # 2's complement, don't you'll we've",
        "no . space , clean ' up ?",
        "\x00\x7f\u200b\ufeff",
    ],
)
def test_text_survives_the_round_trip(text: str, tokenizer: GPT2Tokenizer) -> None:
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < 50257
    assert tokenizer.decode(ids) == text


def test_vocabulary(tokenizer: GPT2Tokenizer) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 50257
    assert tokenizer.model_max_length == 8192
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert special == (50256, 50256, 50256, 50256)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded(side: str, tokenizer: GPT2Tokenizer) -> None:
    batch = tokenizer(["Hello world", "Hello"], padding=True, padding_side=side, return_tensors="pt")
    padded, real = ([50256, 15496], [0, 1]) if side == "left" else ([15496, 50256], [1, 0])
    assert torch.equal(batch["input_ids"], torch.tensor([[15496, 995], padded]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1], real]))


def test_saved_folder_loads_by_auto_tokenizer(tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Albert Einstein was known for 相対性理論.<|endoftext|> Isaac Newton"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (len(loaded), loaded.pad_token_id, loaded.eos_token_id) == (50257, 50256, 50256)
    assert loaded.model_max_length == 8192
