"""`python -m cloister_guard.worker PARENT MEMORY_BYTES CPU_SECONDS [LENT ...]`: started by `worker.process` alone.

Confined before anything is read or anything large is imported. Exit codes are for the guard's log: 0 the guard hung
up, 2 not confined, 3 failed after rows were opened, 4 broken protocol.
"""

from __future__ import annotations

import os
import sys
import tempfile

from cloister_data.errors import CloisterError
from cloister_guard.worker.confine import confine
from cloister_guard.worker.pipe import GuardPipe
from cloister_guard.worker.protocol import ReadyReport, RefusedReport


def main(arguments: list[str]) -> int:
    parent, memory_bytes, cpu_seconds, *lent = (int(argument) for argument in arguments)
    pipe = GuardPipe.take_over()
    try:
        confine(
            parent=parent,
            memory_bytes=memory_bytes,
            cpu_seconds=cpu_seconds,
            keep=frozenset({0, 1, 2, *pipe.descriptors, *lent}),
        )
    except CloisterError as error:
        pipe.send(RefusedReport(problem=error.to_problem()))
        return 2
    # Torch asks for a directory for temporary files while it is imported, and finding one means trying to write there.
    tempfile.tempdir = "/nonexistent"
    from cloister_guard.worker.serve import serve

    pipe.send(ReadyReport())
    return serve(pipe)


if __name__ == "__main__":
    # No clean-up that could print: the guard reads the code.
    os._exit(main(sys.argv[1:]))
