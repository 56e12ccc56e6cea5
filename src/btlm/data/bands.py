"""Bands of MinHash signatures: how likely documents are to share one, and how many bands to use."""

import numpy as np


def pair_probability(jaccard: float, bands: int, rows: int) -> float:
    """Probability that two documents with the given Jaccard similarity share a band."""
    return float(1 - (1 - jaccard**rows) ** bands)


def bands_for_threshold(threshold: float, num_permutations: int) -> tuple[int, int]:
    """Number of bands, and rows per band, whose collision curve rises steeply at a given Jaccard similarity.

    The pair minimizes the mean of the areas of false positives (below the threshold) and false negatives (above it), as
    datasketch and, through it, SlimPajama choose it: 0.8 with 128 permutations gives 9 bands of 13 rows.
    """
    below, above = np.linspace(0, threshold, 1001), np.linspace(threshold, 1, 1001)
    best, least = (1, 1), np.inf
    for bands in range(1, num_permutations + 1):
        for rows in range(1, num_permutations // bands + 1):
            false_positives = np.trapezoid(1 - (1 - below**rows) ** bands, below)
            false_negatives = np.trapezoid((1 - above**rows) ** bands, above)
            if (error := float(false_positives + false_negatives)) < least:
                best, least = (bands, rows), error
    return best
