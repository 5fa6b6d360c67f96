"""A rank ends with the launcher that started it, however that ended: killed by SIGKILL, too, which none hears of."""

import ctypes
import os
import signal
import sys

# In it a rank finds the number of the process that it ends with.
LAUNCHER = "REPO_FAST_LAUNCHER"
# Linux's, from <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have the system send this rank SIGTERM once the process that started it is gone.

    For a rank to call before it works. On Linux; a process that `repo_fast.launcher` did not start stays as it is.
    """
    # What a rank starts has another parent.
    parent = os.environ.pop(LAUNCHER, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        # It was gone before.
        os.kill(os.getpid(), signal.SIGTERM)
