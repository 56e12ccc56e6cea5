"""Imported only by the process that local workers are forked from: none of them outlives the command.

A command that is killed cannot end its workers. Linux does it: each process asks to be killed with its parent.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if sys.platform == "linux":
    _end_with_parent()
    os.register_at_fork(after_in_child=_end_with_parent)
