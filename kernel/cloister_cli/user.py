"""`cloister user`: who may sign in."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError

from cloister.rendering import day
from cloister_cli.choose import ProfileOption, open_chosen
from cloister_cli.output import AsJson, print_json, print_table, say
from cloister_cli.secrets_in import PasswordStdin, read_password
from cloister_data.errors import ConfigurationError, InvalidRequestError
from cloister_data.identity import NewUser, Role, UserList, UserView

app = typer.Typer(no_args_is_help=True, help="Manage users (admins).")


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits, '.', '_' and '-'.", metavar="NAME")],
    role: Annotated[Role, typer.Option("--role", help="scientist, owner or admin.")] = "scientist",
    password_stdin: PasswordStdin = False,
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Add a user with a first password of at least 8 characters."""
    password = read_password(password_stdin, f"Password of {name}", confirm=True)
    new = new_user(name, role, password)
    with open_chosen(profile) as session:
        view = session.transport.call("POST", "/users", new, UserView)
    if as_json:
        print_json(view)
        return
    say(f"{view.user} is a user now, as {view.role}.")


def new_user(name: str, role: Role, password: str) -> NewUser:
    """Raises InvalidRequestError for a name or a password that can't be."""
    try:
        return NewUser(user=name, role=role, password=password)
    except ValidationError as error:
        field = str(error.errors()[0]["loc"][0])
        # Not chained: pydantic's error would carry the password into a traceback.
        raise InvalidRequestError(
            "The password is too short." if field == "password" else f"{name!r} can't be a user's name.",
            next_step="At least 8 characters."
            if field == "password"
            else "Use lower-case letters, digits, '.', '_' and '-'; begin with a letter or a digit.",
        ) from None


@app.command("list")
def list_users(profile: ProfileOption = None, as_json: AsJson = False) -> None:
    """All users and their roles."""
    with open_chosen(profile) as session:
        found = session.transport.call("GET", "/users", None, UserList)
    if as_json:
        print_json(found)
        return
    print_table(
        ["user", "role", "since"],
        [[view.user, view.role, day(view.created)] for view in found.users],
        "There are no users.",
    )


@app.command("hash-password")
def hash_password(password_stdin: PasswordStdin = False) -> None:
    """Print the hash of a password, for [bootstrap] in a cloister's configuration."""
    password = read_password(password_stdin, "Password", confirm=True)
    new_user("admin", "admin", password)
    try:
        from cloister_guard.identity import hash_password as hashed
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "This installation can't hash passwords.",
            why=f"{error.name} is missing.",
            next_step="Run it where the cloister runs, or install it: pip install 'cloister[guard]'.",
        ) from error
    say(hashed(password))
