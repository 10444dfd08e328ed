"""A uid for each kernel, fresh: given out round robin, and never while a process still has it."""

from __future__ import annotations

import os
import secrets

from cloister_data.errors import UnavailableError

UID_FIRST = 200_000
UID_LAST = 265_535


def uids_in_use() -> set[int]:
    """The real, effective, saved and file-system uids of every process, as far as this process may look."""
    found: set[int] = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            found |= uids_of(int(entry))
    return found


def uids_of(pid: int) -> set[int]:
    """The four uids of one process; empty once nothing of it runs. A zombie only waits for its parent to look."""
    uids, runs = _status(f"/proc/{pid}/status")
    if not runs:
        # A process whose first thread has ended looks like a zombie while its other threads go on.
        try:
            threads = os.listdir(f"/proc/{pid}/task")
        except OSError:
            return set()
        runs = any(_status(f"/proc/{pid}/task/{thread}/status")[1] for thread in threads)
    return uids if runs else set()


def _status(path: str) -> tuple[set[int], bool]:
    """(uids, whether it can run) of one process or thread."""
    runs = False
    try:
        with open(path, encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith("State:"):
                    runs = line.split()[1] not in ("Z", "X")
                elif line.startswith("Uid:"):
                    return {int(field) for field in line.split()[1:]}, runs
    except OSError:
        pass
    return set(), False


class UidPool:
    """Gives out uids in turn, from a random start: what a kernel left is met by nobody soon."""

    def __init__(self) -> None:
        self._next = UID_FIRST + secrets.randbelow(UID_LAST - UID_FIRST + 1)
        self._lent: set[int] = set()

    def take(self) -> int:
        """A uid that no process has and that isn't lent. Raises UnavailableError when all are taken."""
        busy = uids_in_use() | self._lent
        for _ in range(UID_FIRST, UID_LAST + 1):
            uid = self._next
            self._next = uid + 1 if uid < UID_LAST else UID_FIRST
            if uid not in busy:
                self._lent.add(uid)
                return uid
        raise UnavailableError("Every kernel uid is taken.", next_step="End kernels that nobody uses.")

    def give_back(self, uid: int) -> None:
        """Its processes are gone."""
        self._lent.discard(uid)
