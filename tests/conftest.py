import os

# Set before any test module imports huggingface_hub, which reads it only once. Everything that tests load is in the
# repository; a test that uses the network fails here as it would on a machine without network.
os.environ["HF_HUB_OFFLINE"] = "1"
