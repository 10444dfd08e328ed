"""A real cloister for tests: `cloister serve` as a child process, on loopback, with owners, data and users.

Nothing in it is a mock but the hardware, which is the product's own simulated platform.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cloister.profile
import cloister.session
from cloister_data.datasets import DatasetList, Declaration, UploadView
from cloister_data.framing import pack_body
from cloister_data.identity import NewUser, Role, UserView
from cloister_data.owner import public_bytes, sign_policy, sign_statement
from cloister_data.policy import Limit, Policy
from cloister_data.populations import SignedStatement, statement_about
from cloister_data.schema import Schema
from cloister_guard.identity import hash_password

ADMIN_PASSWORD = "correct horse battery"
ALL = ("count", "sum", "mean", "train", "evaluate")


def make_policy(dataset: str, users: Mapping[str, float], **changes: object) -> Policy:
    """A generous policy; `users` maps names to epsilon limits."""
    given: dict[str, object] = {
        "dataset": dataset,
        "version": 1,
        "population_limit": Limit(epsilon=50, delta=1e-5),
        "users": {name: Limit(epsilon=epsilon, delta=1e-5) for name, epsilon in users.items()},
        "groups": {},
        "suspended": False,
        "suspended_users": (),
        "release_delta": 1e-6,
        "epsilon_cap": 20.0,
        "operations": ALL,
        "platforms": ("simulated",),
        "minimum_sandbox": "none",
        "transfers": "allowed",
        "expires": None,
    }
    return Policy.model_validate(given | changes)


@dataclass
class RunningCloister:
    """One running cloister. `home` is the laptop's CLOISTER_HOME, `state` the VM's state directory."""

    base: Path
    runtime: Path
    process: subprocess.Popen[bytes]
    url: str
    trust: Path
    groups: list[int] = field(default_factory=list)
    sessions: dict[str, cloister.session.Session] = field(default_factory=dict)
    passwords: dict[str, str] = field(default_factory=lambda: {"admin": ADMIN_PASSWORD})

    @property
    def state(self) -> Path:
        return self.base / "state"

    def session(self, user: str) -> cloister.session.Session:
        """A verified, signed-in session of this user."""
        if user not in self.sessions:
            profile = cloister.profile.new(user, self.url, self.trust, user)
            profile.save()
            session = cloister.session.open(profile, need_token=False)
            cloister.session.login(session, user, self.passwords[user])
            self.sessions[user] = session
        return self.sessions[user]

    def add_user(self, user: str, role: Role) -> None:
        if user not in self.passwords:
            self.passwords[user] = secrets.token_urlsafe(12)
            new = NewUser(user=user, role=role, password=self.passwords[user])
            self.session("admin").transport.call("POST", "/users", new, UserView)

    def upload(
        self, dataset: str, rows: pd.DataFrame, schema: Schema, policy: Policy | None, population: str | None = None
    ) -> UploadView:
        """Upload as the owner, who is made where needed."""
        owner = dataset.split("/")[0]
        self.add_user(owner, "owner")
        session = self.session(owner)
        key = session.profile.owner_key(create=True)
        declaration = Declaration(
            dataset=dataset,
            population=population or dataset,
            data_schema=schema,
            data_format="csv",
            owner_key=public_bytes(key),
            policy=sign_policy(policy, key) if policy else None,
            statement=self.statement(owner, population or dataset, key) if policy else None,
        )
        text = io.StringIO()
        rows.to_csv(text, index=False)
        body = pack_body(declaration.to_json(), text.getvalue().encode())
        return session.transport.call("POST", "/datasets", body, UploadView, "application/vnd.cloister.upload")

    def statement(self, owner: str, population: str, key: Ed25519PrivateKey) -> SignedStatement | None:
        """The owner's word that a new population's people are others, where it is needed."""
        views = self.session(owner).transport.call("GET", "/datasets", None, DatasetList).datasets
        known = {view.population for view in views if view.owner == owner}
        if not known or population in known:
            return None
        return sign_statement(statement_about(population, known), key)

    def restart(self, *arguments: str) -> None:
        """Start the same cloister again after its process has ended. Sessions are opened anew."""
        self.sign_out()
        again = start(self.base, self.runtime, self.base / "cloister.toml", *arguments)
        self.process, self.url, self.trust = again.process, again.url, again.trust
        self.groups += again.groups

    def sign_out(self) -> None:
        for session in self.sessions.values():
            session.close()
        self.sessions.clear()

    def stop(self, by: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(by)
        return self.process.wait(timeout=30)


def write_config(base: Path, runtime: Path, *, listen: str = "127.0.0.1:0", extra: str = "") -> Path:
    path = base / "cloister.toml"
    path.write_text(
        f'name = "test-cloister"\nlisten = "{listen}"\nstate_dir = "{base / "state"}"\nruntime_dir = "{runtime}"\n'
        f'platform = "simulated"\n{extra}\n[bootstrap]\nadmin = "admin"\n'
        f'password_hash = "{hash_password(ADMIN_PASSWORD)}"\n'
    )
    return path


def start(base: Path, runtime: Path, config: Path, *arguments: str) -> RunningCloister:
    """Start `cloister serve` and wait until it is ready."""
    ready = base / "state" / "ready.json"
    ready.unlink(missing_ok=True)
    log = (base / "serve.log").open("ab")
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import typer; from cloister_cli.serve import serve; typer.run(serve)",
            "--config",
            os.fspath(config),
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    log.close()
    deadline = time.monotonic() + 60
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise AssertionError("cloister serve didn't start:\n" + (base / "serve.log").read_text()[-4000:])
        time.sleep(0.02)
    found = json.loads(ready.read_text())
    return RunningCloister(base, runtime, process, found["url"], Path(found["trust"]), [process.pid])


@contextlib.contextmanager
def running_cloister(
    extra: str = "", state: Path | None = None, listen: str = "127.0.0.1:0", arguments: tuple[str, ...] = ()
) -> Iterator[RunningCloister]:
    """A cloister in directories of its own, which are gone afterwards, as are all its processes.

    `state` may name another place for the state directory; with a port in `listen` its clients find it again after a
    restart. `arguments` are `cloister serve`'s.
    """
    base = Path(tempfile.mkdtemp(prefix="clo-state-"))
    runtime = Path(tempfile.mkdtemp(prefix="clo-run-"))
    before = os.environ.get("CLOISTER_HOME")
    os.environ["CLOISTER_HOME"] = str(base / "laptop")
    found: RunningCloister | None = None
    try:
        if state is not None:
            (base / "state").symlink_to(state)
        found = start(base, runtime, write_config(base, runtime, listen=listen, extra=extra), *arguments)
        yield found
    finally:
        if found is not None:
            found.sign_out()
            if found.process.poll() is None:
                found.stop()
            for group in found.groups:
                # A guard that was killed has left its kernel service to the next one.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
        if before is None:
            del os.environ["CLOISTER_HOME"]
        else:
            os.environ["CLOISTER_HOME"] = before
        shutil.rmtree(base, ignore_errors=True)
        shutil.rmtree(runtime, ignore_errors=True)
