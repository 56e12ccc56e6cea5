import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from btlm.data.shards import TokenShards
from btlm.train import train
from btlm.train.distributed import Ranks, join_ranks, shard
from btlm.train.recipe import Parallelism
from tests.data.tiny import write_documents
from tests.train.ranks import recipe_for_ranks
from tests.train.tiny import TOKEN_BYTES, tiny_shards

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    tiny_shards(folder)
    return folder


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    list(train(recipe_for_ranks(), TokenShards(data), output, TOKEN_BYTES))
    return output


@pytest.fixture(scope="module")
def together(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on two ranks."""
    output = tmp_path_factory.mktemp("together") / "run"
    run_ranks(data, output)
    return output


def run_ranks(
    data: Path,
    output: Path,
    *,
    steps: int = 99,
    world_size: int = 2,
    replicate: int = 1,
    documents: bool = False,
) -> None:
    """A run that torchrun starts."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    script = ["-m", "tests.train.ranks", data, output, steps, replicate, documents]
    command = [*launch, *map(str, script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_close(output: Path, expected: Path, rel: float) -> None:
    """Compares losses, gradient norms, held-out losses and weights, up to rounding."""
    assert [record["step"] for record in records(output)] == [1, 2, 3, 4, 5, 6, 7]
    for actual, wanted in zip(records(output), records(expected), strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert actual[key] == pytest.approx(wanted[key], rel=rel), (actual["step"], key)
        for unit in ("nats_per_token", "bits_per_byte"):
            assert (unit in actual) == (unit in wanted) == (actual["step"] in (3, 6, 7))
            assert actual.get(unit, {}) == pytest.approx(wanted.get(unit, {}), rel=rel)
    weights, wanted_weights = (load_file(folder / "model/model.safetensors") for folder in (output, expected))
    assert weights.keys() == wanted_weights.keys()
    for name, tensor in weights.items():
        # The biases of keys have only rounding errors as gradient, which Adam amplifies.
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(tensor, wanted_weights[name], rtol=100 * rel, atol=100 * rel)


def test_two_ranks_compute_what_one_does(alone: Path, together: Path) -> None:
    assert_close(together, alone, rel=2e-6)


def test_ranks_hold_parts_of_the_state(together: Path) -> None:
    state = together / "checkpoints/step-00000007/state"
    sizes = [path.stat().st_size for path in sorted(state.glob("*.distcp"))]
    assert len(sizes) == 2
    assert max(sizes) < 0.7 * sum(sizes)
    assert {path.name for path in state.glob("random-*")} == {"random-0.pt", "random-1.pt"}


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_of_two_ranks_is_resumed(data: Path, together: Path, tmp_path: Path, world_size: int) -> None:
    """The runs are bit-identical on two ranks, and on one rank up to the order of sums."""
    run_ranks(data, tmp_path / "run", steps=4)
    assert (tmp_path / "run/checkpoints/step-00000004").exists()
    if world_size == 2:
        run_ranks(data, tmp_path / "run")
    else:
        list(train(recipe_for_ranks(), TokenShards(data), tmp_path / "run", TOKEN_BYTES))
    assert_close(tmp_path / "run", together, rel=0 if world_size == 2 else 2e-6)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_resumed_on_two(data: Path, alone: Path, tmp_path: Path) -> None:
    for record in train(recipe_for_ranks(), TokenShards(data), tmp_path / "run", TOKEN_BYTES):
        if record["step"] == 4:
            break
    run_ranks(data, tmp_path / "run")
    assert_close(tmp_path / "run", alone, rel=2e-6)


@pytest.mark.slow
def test_replicas_compute_what_one_process_does(data: Path, alone: Path, tmp_path: Path) -> None:
    run_ranks(data, tmp_path / "run", replicate=2)
    assert_close(tmp_path / "run", alone, rel=2e-6)


@pytest.mark.slow
def test_ranks_with_different_numbers_of_valid_tokens(tmp_path: Path) -> None:
    """With documents kept apart, rows predict different numbers of tokens; the loss is the mean over all tokens."""
    documents = [("a", [*(i % 150 + 1 for i in range(3 + n * 7 % 40)), 199]) for n in range(40)]
    write_documents(tmp_path / "shards", {"train": [documents], "validation": [[("a", [1, 2, 3, 4])]]})
    output = tmp_path / "alone"
    recipe = recipe_for_ranks(documents=True)
    list(train(recipe, TokenShards(tmp_path / "shards"), output, TOKEN_BYTES))
    run_ranks(tmp_path / "shards", tmp_path / "together", documents=True)
    assert_close(tmp_path / "together", output, rel=2e-6)


# Ranks without a run


def test_a_single_process_shares_with_itself() -> None:
    ranks = join_ranks("cpu")
    assert (ranks.rank, ranks.world_size, ranks.device) == (0, 1, torch.device("cpu"))
    assert ranks.sum(1, 2.5) == [1, 2.5]
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    ranks.barrier()
    ranks.leave()


def test_a_device_that_torch_cannot_use_is_an_error() -> None:
    with pytest.raises(ValueError, match="The device 'gpu0' is unknown"):
        join_ranks("gpu0")


def test_replicas_divide_the_ranks() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"parallelism\.replicate is 3; give a divisor of the 2 ranks"):
        shard(model, torch.nn.ModuleList(), Parallelism(3), Ranks(torch.device("cpu"), 0, 2))


def test_cpus_do_not_gather_bf16() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"parallelism\.gather_dtype is bfloat16, which needs GPUs; set it to float32"):
        shard(model, torch.nn.ModuleList(), Parallelism(gather_dtype="bfloat16"), Ranks(torch.device("cpu"), 0, 2))


def test_batches_that_do_not_divide_over_the_ranks_are_an_error(data: Path) -> None:
    ranks = Ranks(torch.device("cpu"), 0, 3)
    with pytest.raises(
        ValueError, match=r"stages\[0\]\.batch_tokens is 64; give a multiple of 48, one row for each of 3"
    ):
        next(train(recipe_for_ranks(), TokenShards(data), data.with_name("run"), TOKEN_BYTES, ranks=ranks))
    assert not data.with_name("run").exists()
