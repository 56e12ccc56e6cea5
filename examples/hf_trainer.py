"""Train BTLM with Transformers' own ``Trainer``, at muP's learning rates.

    pip install -c constraints.txt '.[train]' accelerate    (in a clone of the project)
    python examples/hf_trainer.py --model recipes/btlm-tiny.yaml --text book.txt --output runs/hf --steps 200
    python examples/hf_trainer.py --model runs/hf --data data/ --output runs/hf-2 --steps 200

``--model`` is a checkpoint to continue from (a folder, or an id on the Hugging Face Hub), or a recipe whose model
starts from random weights. Text is packed: rows of ``--sequence-length`` tokens, without padding, are cut from one
stream of all files. ``--output`` receives the Trainer's checkpoints and the trained model; the same command, run again,
continues from the last checkpoint.

Only two lines are specific to BTLM: the parameter groups, which give each kind of weight its own learning rate, and
passing the optimizer as ``optimizers=``. The schedule multiplies the rates of all groups by the same factor; the log
shows the rate of the matrices. With FSDP, the Trainer does not accept such an optimizer, and the logits of a whole
forward pass are in memory at once, so use ``btlm train`` for large runs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from btlm import BTLMLMHeadModel
from btlm.data.shards import TokenShards
from btlm.model.tokenization_btlm import load_tokenizer
from btlm.train import load_recipe


def main(arguments: list[str] | None = None) -> Trainer:
    """Train with the options of a command line."""
    args = parse(arguments)
    model = load_model(args.model)
    rows = shard_rows(args) if args.data else text_rows(args)
    groups = model.get_mup_param_groups(args.lr, args.weight_decay)
    use_cache = model.config.use_cache
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_rows,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.lr,
            warmup_steps=args.warmup_steps,
            max_grad_norm=1.0,
            bf16=args.bf16,
            logging_steps=max(1, args.steps // 50),
            save_steps=args.save_steps,
            save_total_limit=2,
            seed=args.seed,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=rows,
        optimizers=(torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True), None),
    )
    last = get_last_checkpoint(args.output) if args.output.exists() else None
    if last is not None and int(last.rpartition("-")[2]) >= args.steps:
        model.load_state_dict(load_model(last).state_dict())  # the Trainer would train one more step
    else:
        trainer.train(resume_from_checkpoint=last)
    model.config.use_cache = use_cache  # the Trainer turns it off for training, and would save it turned off
    trainer.save_model()
    return trainer


def load_model(name: str) -> BTLMLMHeadModel:
    """Load a checkpoint, or build the model of a recipe, in fp32; bf16 training keeps fp32 weights."""
    if not name.endswith((".yaml", ".yml")):
        return BTLMLMHeadModel.from_pretrained(name, dtype=torch.float32)
    recipe = load_recipe(name)
    if recipe.start is not None:
        return BTLMLMHeadModel.from_pretrained(recipe.start.model, config=recipe.config, dtype=torch.float32)
    torch.manual_seed(recipe.seed)
    return BTLMLMHeadModel(recipe.config)


class PackedRows(Dataset[dict[str, Tensor]]):
    """Consecutive rows of equal length from a stream of tokens; the model shifts the labels."""

    def __init__(self, read: Callable[[int, int], NDArray[Any]], num_tokens: int, length: int) -> None:
        self.read, self.num_rows, self.length = read, num_tokens // length, length
        if not self.num_rows:
            raise ValueError(f"{num_tokens:,} tokens do not fill a row of {length:,}; give more text or shorter rows.")

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.length
        ids = torch.from_numpy(self.read(start, self.length).astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def shard_rows(args: argparse.Namespace) -> PackedRows:
    """Rows of the training split of token shards, which stay on disk."""
    shards = TokenShards(args.data)
    return PackedRows(
        lambda start, length: shards.tokens("train", start, length), shards.num_tokens("train"), args.sequence_length
    )


def text_rows(args: argparse.Namespace) -> PackedRows:
    """Rows of text files; each file is a document that ends with end-of-text."""
    recipe = args.model.endswith((".yaml", ".yml"))
    tokenizer = load_tokenizer() if recipe else AutoTokenizer.from_pretrained(args.model)
    ids: list[int] = []
    for path in args.text:
        ids += [*tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids, tokenizer.eos_token_id]
    stream = np.array(ids)
    return PackedRows(lambda start, length: stream[start : start + length], len(stream), args.sequence_length)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="checkpoint folder, id on the Hugging Face Hub, or recipe (.yaml)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, nargs="+", help="text files")
    source.add_argument("--data", type=Path, help="folder of token shards, from `btlm data`")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--batch-rows", type=int, default=4, help="rows per forward pass on one device")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate, at muP's base width")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--bf16", action="store_true", help="bf16 products, on CPUs too; weights and sums stay fp32")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
