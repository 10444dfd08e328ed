"""`cloister demo`: a simulated cloister, two hospitals, and the quickstart notebook through its remote kernel."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from cloister.profile import Profile
from cloister.session import open as open_session
from cloister_cli import demo_data, demo_report
from cloister_cli.children import Served, serving, stopped_at_end, terminated_like_interrupted
from cloister_cli.connect import connect_profile
from cloister_cli.dataset import publish
from cloister_cli.output import note, print_json, say
from cloister_cli.user import new_user
from cloister_data.errors import ConfigurationError, StorageError
from cloister_data.identity import UserView
from cloister_data.policy import Sandbox
from cloister_data.schema import Schema

PROFILE = "demo"
SCIENTIST, ADMIN = "scientist", "admin"
FREE_BYTES = 300 << 20
MARKER = "made-by-cloister-demo"


@dataclass(frozen=True)
class Place:
    """Where the demo keeps its things."""

    root: Path
    unsafe_no_sandbox: bool = False

    @property
    def sandbox(self) -> Sandbox:
        """How the kernels are kept apart here."""
        if self.unsafe_no_sandbox:
            return "user" if os.geteuid() == 0 else "none"
        return "confined"

    @property
    def config(self) -> Path:
        return self.root / "cloister.toml"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def passwords(self) -> Path:
        return self.root / "passwords.json"

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def jupyter(self) -> Path:
        return self.root / "jupyter"

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def html(self) -> Path:
        return self.root / "quickstart.html"

    @property
    def log(self) -> Path:
        return self.root / "serve.log"


def demo(
    lab: Annotated[
        bool, typer.Option("--lab", help="Open the demo that was run before in JupyterLab, with the same data.")
    ] = False,
    state: Annotated[Path, typer.Option("--state", help="Where everything is kept.", file_okay=False)] = Path(".demo"),
    port: Annotated[int, typer.Option("--port", help="Of the cloister; 0 takes a free one.", min=0, max=65535)] = 0,
    unsafe_no_sandbox: Annotated[
        bool,
        typer.Option(
            "--unsafe-no-sandbox", help="Don't confine the kernels, where a sandbox can't be had on this computer."
        ),
    ] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="With --lab: open a browser.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON document.")] = False,
) -> None:
    """Run the whole thing on this computer: simulated hardware, two hospitals, private training in a remote kernel.

    Everything is made anew below ./.demo; nothing outside it is changed, and no process stays behind.
    """
    place = Place(state.absolute(), unsafe_no_sandbox)
    _need_guard()
    with terminated_like_interrupted(), _storage_errors(place.root):
        try:
            if lab:
                _open_lab(place, port, browser)
            else:
                _run(place, port, as_json)
        except KeyboardInterrupt:
            say("Stopped; no process was left behind.")
            raise typer.Exit(130) from None


def _run(place: Place, port: int, as_json: bool) -> None:
    from cloister_cli.demo_notebook import run_notebook

    started = time.monotonic()
    notebook = find_notebook()
    if place.unsafe_no_sandbox:
        note("KERNELS ARE NOT CONFINED (--unsafe-no-sandbox): for trying out only, never for real data.")
    _wipe(place)
    steps = demo_report.Steps(quiet=as_json)
    with _environment(place):
        _write_passwords(place)
        with contextlib.ExitStack() as stack:
            with steps.step("A simulated cloister starts"):
                served = stack.enter_context(_served(place, port))
            with steps.step("An admin adds two hospitals and a scientist"):
                _add_users(place, served)
            for owner, content in demo_data.csv_files().items():
                with steps.step(f"{owner} verifies the machine and uploads its records"):
                    _upload(place, served, owner, content)
            with steps.step("The scientist's laptop verifies the machine and connects"):
                _connect(place, served, SCIENTIST, PROFILE, kernel=True)
            run_notebook(notebook, place.notebooks / "quickstart.ipynb", place.html, f"cloister-{PROFILE}", steps)
            served.check()
            with open_session(PROFILE) as session:
                summary = demo_report.collect(session, place.html, time.monotonic() - started)
    if as_json:
        print_json(summary.as_json())
    else:
        demo_report.show(summary)


def _open_lab(place: Place, port: int, browser: bool) -> None:
    import subprocess

    from cloister_cli.lab import lab_command, require_lab

    require_lab()
    if not (place.root / MARKER).exists() or not (place.notebooks / "quickstart.ipynb").exists():
        raise ConfigurationError(
            "There is no demo to open yet.", why=f"{place.root} holds none.", next_step="Run it first: make demo."
        )
    with _environment(place), _served(place, port) as served:
        _connect(place, served, SCIENTIST, PROFILE, kernel=True)
        say(f"The cloister runs at {served.url}. JupyterLab opens; Ctrl-C here stops both.")
        command = lab_command(place.notebooks, browser=browser, open_file="quickstart.ipynb")
        if os.geteuid() == 0:
            command.append("--allow-root")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        with stopped_at_end(process):
            while process.poll() is None:
                served.check()
                time.sleep(0.3)


def find_notebook() -> Path:
    """quickstart.ipynb: of the checkout that this runs from, or of the installed package."""
    here = Path(__file__).resolve()
    for candidate in (here.parents[2] / "notebooks" / "quickstart.ipynb", here.with_name("quickstart.ipynb")):
        if candidate.is_file():
            return candidate
    raise ConfigurationError(
        "The quickstart notebook isn't there.",
        why="It lies in the folder `notebooks` of the source.",
        next_step="Run the demo from a clone of the repository: make demo.",
    )


@contextlib.contextmanager
def _served(place: Place, port: int) -> Iterator[Served]:
    # Unix socket paths are short, and the kernels' own users must be able to reach theirs.
    runtime = Path(tempfile.mkdtemp(prefix="cloister-"))
    try:
        _write_config(place, port, runtime)
        options = ["--unsafe-no-sandbox"] if place.unsafe_no_sandbox else []
        with serving(place.config, place.state, place.log, *options) as served:
            yield served
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


def _write_config(place: Place, port: int, runtime: Path) -> None:
    from cloister_guard.identity import hash_password

    lines = [
        'name = "demo"',
        f'listen = "127.0.0.1:{port}"',
        f"state_dir = {json.dumps(os.fspath(place.state))}",
        f"runtime_dir = {json.dumps(os.fspath(runtime))}",
        'platform = "simulated"',
        "kernel_pool = 1",
        "",
        "[bootstrap]",
        f'admin = "{ADMIN}"',
        f"password_hash = {json.dumps(hash_password(_password(place, ADMIN)))}",
    ]
    _write_private(place.config, "\n".join(lines) + "\n")


def _add_users(place: Place, served: Served) -> None:
    profile = _connect(place, served, ADMIN, ADMIN)
    roles: list[tuple[str, Literal["owner", "scientist"]]] = [(owner, "owner") for owner in demo_data.OWNERS]
    with open_session(profile) as session:
        for name, role in [*roles, (SCIENTIST, "scientist")]:
            session.transport.call("POST", "/users", new_user(name, role, _password(place, name)), UserView)


def _upload(place: Place, served: Served, owner: str, content: str) -> None:
    declared = place.root / "declared"
    declared.mkdir(exist_ok=True)
    (declared / "schema.toml").write_text(demo_data.schema_toml(), "utf-8")
    policy = declared / "policy.toml"
    # Kernels get users of their own only where the cloister was started by root.
    policy.write_text(demo_data.policy_toml(place.sandbox), "utf-8")
    schema: Schema = demo_data.schema()
    name = f"{owner}/{demo_data.DATASET}"
    with open_session(_connect(place, served, owner, owner)) as session:
        publish(session, name, schema, content.encode(), "csv", policy=policy, population=f"{owner}/patients")


def _connect(place: Place, served: Served, user: str, name: str, *, kernel: bool = False) -> Profile:
    return connect_profile(
        name, served.url, served.trust, user, _password(place, user), kernels=place.jupyter, kernel=kernel
    )


@contextlib.contextmanager
def _environment(place: Place) -> Iterator[None]:
    """This process and its children use the demo's profiles and kernels, and no others."""
    previous = {name: os.environ.get(name) for name in ("CLOISTER_HOME", "JUPYTER_PATH")}
    os.environ["CLOISTER_HOME"] = os.fspath(place.home)
    found = previous["JUPYTER_PATH"]
    os.environ["JUPYTER_PATH"] = os.pathsep.join([os.fspath(place.jupyter), *([found] if found else [])])
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wipe(place: Place) -> None:
    """Begin anew. A folder that this command didn't make is left alone."""
    if place.root.exists() and any(place.root.iterdir()) and not (place.root / MARKER).exists():
        raise ConfigurationError(
            f"{place.root} isn't empty, and it isn't a demo's.",
            why="The demo begins by removing what an earlier one left.",
            next_step="Choose another folder: cloister demo --state DIR.",
        )
    shutil.rmtree(place.root, ignore_errors=True)
    place.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    free = shutil.disk_usage(place.root).free
    if free < FREE_BYTES:
        raise StorageError(
            f"There is too little space in {place.root}.",
            why=f"{free >> 20} MiB are free; the demo needs {FREE_BYTES >> 20}.",
            next_step="Make room, or choose another folder: cloister demo --state DIR.",
        )
    (place.root / MARKER).touch()
    place.notebooks.mkdir()


def _write_passwords(place: Place) -> None:
    names = (ADMIN, *demo_data.OWNERS, SCIENTIST)
    _write_private(place.passwords, json.dumps({name: secrets.token_urlsafe(16) for name in names}))


def _password(place: Place, user: str) -> str:
    return str(json.loads(place.passwords.read_text("utf-8"))[user])


def _write_private(path: Path, content: str) -> None:
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(content)


@contextlib.contextmanager
def _storage_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        raise StorageError(
            f"{error.filename or root} can't be written.",
            why=f"{error.strerror}.",
            next_step="Make room or check its permissions, or choose another folder: cloister demo --state DIR.",
        ) from error


def _need_guard() -> None:
    needed = ("argon2", "fastapi", "nbclient", "nbconvert", "opacus", "opendp", "sklearn", "sqlalchemy", "torch")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            "The demo runs a whole cloister, and this installation has only a part of it.",
            why=f"Missing: {', '.join(missing)}.",
            next_step="Run `make demo` in a clone, or: pip install 'cloister[guard,lab]'.",
        )
