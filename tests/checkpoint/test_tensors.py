import pytest
import torch
from safetensors.torch import load_file

from btlm.checkpoint.open import Checkpoint
from btlm.checkpoint.tensor_file import read_header
from btlm.checkpoint.tensors import Weights
from tests.checkpoint.tiny import change_tensors, cut, pickle_tensors

LAST = "transformer.ln_f.weight"


@pytest.mark.parametrize("pickled", [None, {}, {"_use_new_zipfile_serialization": False}])
def test_tensors_are_read_one_at_a_time_from_every_form(copy, checkpoint, pickled):
    if pickled is not None:
        pickle_tensors(copy, **pickled)
    weights = Weights(Checkpoint.open(copy))
    for name, expected in load_file(checkpoint / "model.safetensors").items():
        assert weights.dtype(name) == expected.dtype
        assert torch.equal(weights.read(name), expected), name


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(copy):
    weights = Weights(Checkpoint.open(copy))
    path = copy / "model.safetensors"
    last = max((stored.start, name) for name, stored in read_header(path).items())[1]
    cut(path, 0.9)
    with pytest.raises(ValueError, match=r"model\.safetensors has become shorter while it was read; get it again"):
        weights.read(last)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_named(copy, bad):
    change_tensors(copy, lambda tensors: {**tensors, LAST: torch.full_like(tensors[LAST], bad)})
    with pytest.raises(ValueError, match=f"{LAST} holds NaN or infinity"):
        Weights(Checkpoint.open(copy)).read(LAST)
