"""A rank ends with the launcher that started it, however that ended: killed by SIGKILL, too, which none hears of."""

import ctypes
import os
import signal
import sys

import psutil

# In it a rank finds the number of the process that it ends with.
LAUNCHER = "REPO_FAST_LAUNCHER"
# Linux's, from <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have the system send this rank SIGTERM once the process that started it is gone.

    For a rank to call before it works. On Linux; a process that `repo_fast.launcher` did not start stays as it is, and
    so does one between which and the launcher another stands, such as a profiler.
    """
    # Not for what a rank starts.
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None or sys.platform != "linux":
        return
    if os.getppid() == int(launcher):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if _is_gone(int(launcher)):
        # Before it could be asked for.
        os.kill(os.getpid(), signal.SIGTERM)


def _is_gone(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
