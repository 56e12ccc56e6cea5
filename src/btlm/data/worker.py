"""Makes local workers end with their command. Only the process that they are forked from imports this module.

A killed command cannot end its workers itself. Linux can: each process asks to be killed when its parent dies.
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
