"""An upload's bytes are parsed in a disposable, confined worker: a Parquet reader may crash, the guard must not.

What comes back is trusted no more than the file: the guard parses none of it, and checks every value again.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pyarrow as pa

from cloister_data.errors import InternalError, InvalidRequestError
from cloister_data.schema import Schema
from cloister_guard.datasets.ingest import Format, check_values
from cloister_guard.datasets.layout import take_table
from cloister_guard.datasets.readers import MAX_DECODED_BYTES
from cloister_guard.worker.process import Worker, WorkerLimits
from cloister_guard.worker.shared import lend_bytes, lend_room, view

UPLOADS_AT_ONCE = 2


class UploadReader:
    """Reads uploads, each in a worker of its own. To be called from a thread, not from the event loop."""

    def __init__(self, limits: WorkerLimits) -> None:
        # It works on one thread: whoever waits no longer lets it compute no longer.
        self._limits = replace(limits, cpu_seconds=min(limits.cpu_seconds, math.ceil(limits.answer_seconds)))

    def __call__(self, blob: bytes | memoryview, data_format: Format, schema: Schema) -> pa.Table:
        """The rows as `ingest.read_rows` gives them.

        Raises its errors, which tell the owner what is wrong; InvalidRequestError also where the worker didn't survive;
        UnavailableError where it can't be started.
        """
        with lend_room(MAX_DECODED_BYTES) as answer:
            try:
                with lend_bytes(blob) as upload:
                    rows = asyncio.run(self._read(schema, data_format, upload, answer))
            except InternalError as error:
                raise InvalidRequestError(
                    f"The upload can't be read as {'CSV' if data_format == 'csv' else 'Parquet'}.",
                    why="Reading it broke the process that tried, or took more memory or time than it may.",
                    next_step="Nothing was stored. Write the file anew with another tool, or with fewer rows.",
                ) from error
            # The worker is dead: nobody changes this memory between the check and the use.
            table = take_table(view(answer), schema, rows)
        check_values(table, schema)
        return table

    async def _read(self, schema: Schema, data_format: Format, upload: int, answer: int) -> int:
        async with Worker.start(self._limits, (upload, answer)) as worker:
            return await worker.read(schema, data_format, upload, answer)
