"""`cloister connect`: verify a cloister, sign in, and put its kernel into JupyterLab."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cloister import profile as profiles
from cloister.profile import Profile
from cloister.session import login
from cloister.session import open as open_session
from cloister_cli.output import AsJson, busy, note, print_json, say
from cloister_cli.secrets_in import PasswordStdin, read_password
from cloister_data.errors import ConfigurationError
from cloister_data.identity import LoginAnswer


def connect(
    url: Annotated[str, typer.Argument(help="https://HOST[:PORT]", metavar="URL")],
    trust: Annotated[
        Path | None,
        typer.Option("--trust", help="The trust file (TOML): what the machine must prove. Remembered for next time."),
    ] = None,
    user: Annotated[str | None, typer.Option("--user", help="Who signs in. Remembered for next time.")] = None,
    password_stdin: PasswordStdin = False,
    name: Annotated[
        str | None, typer.Option("--name", help="What to call this cloister here; by default after its host.")
    ] = None,
    reattest_every: Annotated[
        int | None,
        typer.Option(
            "--reattest-every",
            help="How often the machine has to prove itself again while something is connected to it; by default every "
            f"{profiles.REATTEST_SECONDS} seconds. Remembered for next time.",
            metavar="SECONDS",
            min=profiles.MIN_REATTEST_SECONDS,
            max=profiles.MAX_REATTEST_SECONDS,
        ),
    ] = None,
    kernel: Annotated[
        bool, typer.Option("--kernel/--no-kernel", help="Offer the cloister's kernel in JupyterLab (scientists).")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Verify a cloister's evidence, sign in, and offer its kernel in JupyterLab.

    Nothing is sent before every check of the trust file has passed; then the password, over the verified channel. From
    then on the machine proves itself again and again: once it doesn't, nothing more is sent to it.
    """
    profile = _profile(url, trust, user, name, reattest_every)
    with busy(f"Verifying {profile.url} ..."):
        session = open_session(profile, need_token=False)
    with session:
        if not as_json:
            say(session.verdict.table())
        who = profile.user or _ask_user()
        password = read_password(password_stdin, f"Password of {who}")
        answer = login(session, who, password)
        signed_in = profile.model_copy(update={"user": who})
        signed_in.save()
        spec = _offer_kernel(signed_in, answer) if kernel else None
        if as_json:
            print_json(
                {
                    "profile": profile.name,
                    "url": profile.url,
                    "user": answer.user,
                    "role": answer.role,
                    "expires": answer.expires,
                    "reattest_seconds": profile.reattest_seconds,
                    "simulated": session.verdict.simulated,
                    "kernelspec": str(spec) if spec else None,
                    "verdict": session.verdict.model_dump(mode="json"),
                }
            )
            return
    say(f"Signed in at {profile.url} as {answer.user} ({answer.role}). On this computer it is called {profile.name!r}.")
    if spec is not None:
        say(f"JupyterLab now offers the kernel 'Cloister: {profile.name}'. Open it with: cloister lab")
    elif answer.role == "owner":
        say("Upload a dataset with: cloister dataset upload FILE --name OWNER/NAME --schema FILE --policy FILE")


def connect_profile(
    name: str, url: str, trust: Path, user: str, password: str, *, kernels: Path | None = None, kernel: bool = False
) -> Profile:
    """The same for programs: verify, sign in, save; and write the kernelspec below `kernels` where `kernel` says so."""
    profile = profiles.new(name, url, trust, user)
    with open_session(profile, need_token=False) as session:
        answer = login(session, user, password)
        profile.save()
    if kernel:
        _offer_kernel(profile, answer, kernels)
    return profile


def default_name(url: str) -> str:
    """A profile's name after the address: `vm.hospital.org`, or with the port where it isn't the usual one."""
    address = profiles.parse_url(url)
    raw = address.host if address.port == profiles.DEFAULT_PORT else f"{address.host}-{address.port}"
    return re.sub(r"[^a-z0-9._-]", "-", raw.lower()).strip("._-")[:63] or "cloister"


def _profile(url: str, trust: Path | None, user: str | None, name: str | None, every: int | None) -> Profile:
    chosen = name or default_name(url)
    known = profiles.load(chosen) if chosen in profiles.names() else None
    if trust is None:
        if known is None or known.url != url.rstrip("/"):
            raise ConfigurationError(
                "A new cloister needs a trust file.",
                why="It says what the machine must prove before anything is sent to it.",
                next_step="Get it from the operator by a way that you trust, then: cloister connect URL --trust FILE.",
            )
        trust = known.trust
    if every is None:
        every = known.reattest_seconds if known is not None else profiles.REATTEST_SECONDS
    who = user or (known.user if known is not None else None)
    return profiles.new(chosen, url, trust, who, reattest_seconds=every)


def _ask_user() -> str:
    answer: str = typer.prompt("User")
    return answer


def _offer_kernel(profile: Profile, answer: LoginAnswer, directory: Path | None = None) -> Path | None:
    if answer.role != "scientist":
        return None
    try:
        from cloister_kernel.kernelspec import install_kernelspec
    except ModuleNotFoundError as error:
        note(f"No kernel was offered to JupyterLab: {error.name} is missing. Install it: pip install 'cloister[lab]'.")
        return None
    return install_kernelspec(profile.name, f"Cloister: {profile.name}", directory)
