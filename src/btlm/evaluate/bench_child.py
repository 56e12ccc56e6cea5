"""One measurement of :mod:`btlm.evaluate.bench`, as a process of its own: ``python -m btlm.evaluate.bench_child TASK``.

The task is a JSON object; lines of JSON on standard output report its progress and its result. The process imports
neither torch nor matplotlib, so that its memory is that of the engine.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from btlm.checkpoint.open import Checkpoint
from btlm.engine.cache import cache_bytes
from btlm.engine.engine import Engine
from btlm.engine.memory import peak_memory, read_rate
from btlm.engine.options import GenerationOptions
from btlm.model.architecture_btlm import Architecture


def measure(
    folder: Path, context: int, new_tokens: int, threads: int | None, cache_dtype: str = "auto"
) -> dict[str, Any]:
    """Fill a context with a random prompt and ``new_tokens`` decoded tokens.

    Returns:
        ``open_s``; ``prefill_tokens_per_s`` for ``context - new_tokens`` tokens, including the first reading of the
        weights from the file; ``decode_tokens_per_s`` of the median step; bytes of all weights, and of those that a
        step reads; bytes of the full cache, and of the part that a step reads; and ``peak_bytes`` of the whole process.
    """
    start = time.perf_counter()
    checkpoint = Checkpoint.open(folder)
    engine = Engine.open(checkpoint, context=context, cache_dtype=cache_dtype, threads=threads)
    opened = time.perf_counter()
    architecture, dtype = engine.architecture, engine.cache.dtype
    ids = np.random.default_rng(0).integers(0, architecture.vocab_size, context - new_tokens).tolist()
    options = GenerationOptions(max_new_tokens=new_tokens, lookup_tokens=0)
    begun = time.perf_counter()
    request = engine.add(ids, options, stop_ids=frozenset())
    ends: list[float] = []
    while request.finished is None:
        if engine.step():
            ends.append(time.perf_counter())
        _tell({"tokens": request.cached})
    weights = {name: tensor.values.nbytes for name, tensor in checkpoint.tensors.items()}
    steps = np.diff(ends)
    return {
        "weight_dtype": engine.network.weight_dtype,
        "cache_dtype": dtype,
        "open_s": opened - start,
        "prefill_tokens_per_s": len(ids) / (ends[0] - begun),
        "decode_tokens_per_s": 1 / float(np.median(steps)),
        "weight_bytes": sum(weights.values()),
        "weight_bytes_read": sum(weights.values()) - _unread(architecture, weights),
        "cache_bytes": cache_bytes(architecture, dtype, context),
        "cache_bytes_read": cache_bytes(architecture, dtype, context - new_tokens // 2),
        "peak_bytes": peak_memory(),
    }


def _unread(architecture: Architecture, weights: dict[str, int]) -> int:
    """Bytes of a token table that is not also the head: a step reads only one row of it."""
    if architecture.tie_word_embeddings:
        return 0
    return sum(size for name, size in weights.items() if name.removeprefix("transformer.").startswith("wte."))


def _tell(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(task: dict[str, Any]) -> int:
    """Run a task: the arguments of :func:`measure`, or only ``threads`` for :func:`read_rate`."""
    try:
        result = measure(Path(task.pop("folder")), **task) if "folder" in task else read_rate(**task)
    except (ValueError, MemoryError) as error:
        _tell({"error": str(error) or "The memory does not suffice."})
        return 1
    except KeyboardInterrupt:
        return 130
    _tell({"result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
