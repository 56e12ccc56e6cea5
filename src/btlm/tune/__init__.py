"""Checks of muP, and the search for hyperparameters on a narrow proxy."""
