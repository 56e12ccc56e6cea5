import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("sanitizer", ["none", "address", "thread"])
def test_the_kernels_without_python(sanitizer):
    """Compare every instruction set with plain C++, under the sanitizers of GCC and Clang."""
    script = Path(__file__).parent / "native" / "sanitize.sh"
    environment = {**os.environ, "SANITIZE": sanitizer}
    done = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" 0 failures\n")
