"""What a model or a run costs, from numbers alone."""
