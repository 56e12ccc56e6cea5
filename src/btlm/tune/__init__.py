"""Checks of muP, and hyperparameter search on a narrow proxy model."""
