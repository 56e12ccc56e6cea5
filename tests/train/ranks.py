"""The program of each rank in tests/train/test_distributed.py: a tiny run that ends after some steps."""

import sys
from pathlib import Path

import torch

from btlm.data.shards import TokenShards
from btlm.train import train
from btlm.train.distributed import join_ranks
from btlm.train.recipe import Checkpoints, Data, Parallelism, Precision, Recipe
from tests.train.tiny import TOKEN_BYTES, tiny_recipe


def recipe_for_ranks(replicate: int = 1, documents: bool = False) -> Recipe:
    """The run is in fp32, so that one process and several differ only by the order of their sums."""
    return tiny_recipe(
        precision=Precision("float32"),
        parallelism=Parallelism(replicate),
        checkpoints=Checkpoints(every_steps=2, keep_last=9),
        data=Data(mask_documents=documents),
    )


def main(data: str, output: str, steps: str, replicate: str, documents: str) -> None:
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    recipe = recipe_for_ranks(int(replicate), documents == "True")
    for record in train(recipe, TokenShards(data), Path(output), TOKEN_BYTES, ranks=ranks):
        if record["step"] == int(steps):
            break
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
