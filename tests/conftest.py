import os

# Set before any test module imports huggingface_hub, which reads it once. Everything that tests load is in the
# repository; a test that reaches for the network fails here as it would on a machine without one.
os.environ["HF_HUB_OFFLINE"] = "1"
