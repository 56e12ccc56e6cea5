import datasketch
import pytest

from btlm.data.bands import bands_for_threshold, pair_probability
from btlm.data.recipe import Dedup
from btlm.settings import plain


@pytest.mark.parametrize(
    ("jaccard", "percent"),
    [(0.70, 8), (0.80, 40), (0.85, 69), (0.90, 93)],  # SlimPajama's bands
)
def test_pair_probability(jaccard, percent):
    assert round(100 * pair_probability(jaccard, 9, 13)) == percent


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_bands_of_a_threshold_are_datasketchs(threshold):
    assert bands_for_threshold(threshold, 128) == datasketch.lsh._optimal_param(threshold, 128, 0.5, 0.5)


def test_slimpajamas_bands_are_those_of_threshold_08():
    assert bands_for_threshold(0.8, 128) == (9, 13)
    assert (Dedup(threshold=0.8).bands, Dedup(threshold=0.8).rows) == (Dedup().bands, Dedup().rows)


def test_printed_settings_with_a_threshold_are_settings():
    settings = Dedup(threshold=0.5)
    assert (settings.bands, settings.rows) == (25, 5)
    assert Dedup(**plain(settings)) == settings
