import random

import pytest

from btlm.data.inspect import _jaccard
from btlm.data.recipe import Dedup
from tests.data.corpus import edited, text
from tests.data.test_minhash import plain_document


@pytest.mark.parametrize("settings", [Dedup(), Dedup(shingle="words", shingle_size=3)])
def test_the_similarity_that_is_shown(settings):
    rng = random.Random(0)
    first = text(rng)
    for second in (first, edited(first, rng, 0.02), edited(first, rng, 0.3), first[:300], text(rng), "short", "?"):
        one, two = (set(plain_document(t, settings.shingle, settings.shingle_size)) for t in (first, second))
        assert _jaccard(first, second, settings) == _jaccard(second, first, settings) == len(one & two) / len(one | two)
    assert _jaccard("?", "!", settings) == 0
