"""Kill every process of one kernel's uid: `python -I -S sweep.py UID`, as root.

kill(-1) from that uid reaches all of its processes in one step; a list of them can't, against something that forks.
"""

import os
import signal
import sys

FIRST, LAST = 200_000, 265_535  # cloister_kernel.uids; this file runs without the package


def main() -> int:
    uid = int(sys.argv[1])
    if not FIRST <= uid <= LAST:
        return 2
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
