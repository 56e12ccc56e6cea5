"""What an engine needs of the memory, and whether there is enough."""

from collections.abc import Callable, Mapping

from btlm.checkpoint.tensor_file import MappedTensor, resident_bytes
from btlm.console import gigabytes
from btlm.errors import DoesNotFit
from btlm.kernels import Kernels, num_pages
from btlm.kernels.arrays import PAGE_TOKENS
from btlm.model.architecture_btlm import Architecture

from .cache import cache_bytes
from .network import activation_bytes, weight_dtype

_SPARE = 16_000_000  # bytes beside weights, cache and activations: what kernels and Python allocate


def cache_places(context: int, num_requests: int, cache_tokens: int | None) -> int:
    """Tokens of the cache, in whole pages for each request unless their number is given.

    Raises:
        ValueError: A number is impossible.
    """
    if context < 1 or num_requests < 1:
        raise ValueError(
            f"A context of {context} tokens and {num_requests} requests are not possible; both are at least 1."
        )
    if cache_tokens is not None and cache_tokens < context:
        raise ValueError(
            f"A cache of {cache_tokens:,} tokens is too small for one request of {context:,}; give more, or a shorter "
            "context."
        )
    return num_requests * num_pages(context) * PAGE_TOKENS if cache_tokens is None else cache_tokens


def fitting_places(
    architecture: Architecture, context: int, num_requests: int, bytes_of: Callable[[int], int], free: int | None
) -> int:
    """Tokens of a cache that takes at most half of the memory that weights leave.

    Args:
        architecture: Architecture of the network.
        context: Tokens per request, which always have a place.
        num_requests: Number of requests; more than all of them can use is not given.
        bytes_of: Bytes of a cache, by its number of tokens.
        free: Bytes that are left beside the weights; ``None`` if that is not known.
    """
    least, most = cache_places(context, 1, None), cache_places(context, num_requests, None)
    if free is None:
        return most
    page = bytes_of(PAGE_TOKENS)
    room = (free - activation_bytes(architecture) - _SPARE) // 2 // page * PAGE_TOKENS
    return min(max(least, room), most)


def weight_bytes(architecture: Architecture, tensors: Mapping[str, MappedTensor], kernels: Kernels) -> int:
    """Bytes of the weights in memory, as far as kernels unpack them too."""
    weights = sum(resident_bytes(tensor) for tensor in tensors.values())
    if weight_dtype(architecture, tensors) not in ("float32", "float16"):
        weights += kernels.unpacked_bytes * architecture.num_parameters()
    return weights


def check_memory(
    architecture: Architecture, weights: int, cache_dtype: str, cache_tokens: int, available: int | None
) -> None:
    """Check that weights and cache fit the memory.

    Args:
        architecture: Architecture of the network.
        weights: Bytes of the weights; of a draft, also of what else it needs.
        cache_dtype: Dtype of the cache.
        cache_tokens: Tokens of the cache.
        available: Bytes that are free; ``None`` if that is not known.

    Raises:
        DoesNotFit: They do not.
    """
    cache = cache_bytes(architecture, cache_dtype, cache_tokens)
    rest = weights + activation_bytes(architecture) + _SPARE
    needed = rest + cache
    if available is not None and needed > available:
        smallest = cache_bytes(architecture, "int4", cache_tokens)
        remedy = "a shorter context (prompt and new tokens)"
        if rest + cache_bytes(architecture, "int4", 1) > available:
            remedy = "weights in fewer bits (btlm quantize)"
        elif smallest < cache and rest + smallest <= available:
            remedy += f", or an int4 cache ({gigabytes(smallest)})"
        raise DoesNotFit(
            f"A cache of {cache_tokens:,} tokens takes {gigabytes(cache)} in {cache_dtype} beside weights of "
            f"{gigabytes(weights)}: {gigabytes(needed)} in all, and {gigabytes(available)} of memory are free; use "
            f"{remedy}."
        )
