"""Token shards written by hand, byte for byte, so that tests know every token in them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from btlm.data import TokenShards


def write_streams(folder: Path, streams: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> TokenShards:
    """Shards whose sources hold the given training and held-out streams."""
    folder.mkdir(parents=True)
    manifest: dict[str, dict[str, dict[str, int]]] = {}
    for source, splits in streams.items():
        manifest[source] = {}
        for split, tokens in zip(("train", "valid"), splits, strict=True):
            array = np.asarray(tokens, dtype="<u2")
            (folder / f"{source}.{split}.bin").write_bytes(array.tobytes())
            manifest[source][split] = {"documents": 1, "bytes": 1, "tokens": array.size}
    (folder / "manifest.json").write_text(json.dumps({"sources": manifest}))
    return TokenShards(folder)
