"""A checkpoint to a quantized checkpoint or to a GGUF file."""
