"""Users, roles, and signing in."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cloister_data.base import Text, UnixSeconds, UserName, Wire
from cloister_data.policy import Sandbox

Role = Literal["scientist", "owner", "admin"]
Password = Annotated[str, StringConstraints(min_length=8, max_length=1024)]


class LoginRequest(Wire):
    user: UserName
    password: Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class LoginAnswer(Wire):
    """`token` is sent as `Authorization: Bearer ...` until `expires`."""

    token: Annotated[str, StringConstraints(min_length=16, max_length=256)]
    user: UserName
    role: Role
    expires: UnixSeconds


class WhoAmI(Wire):
    """`sandbox` is how the kernel that asks is kept apart; None where it isn't a kernel that asks."""

    user: UserName
    role: Role
    cloister: Text
    simulated: bool
    version: Text
    sandbox: Sandbox | None = None


class NewUser(Wire):
    user: UserName
    role: Role
    password: Password


class UserView(Wire):
    user: UserName
    role: Role
    created: UnixSeconds


class UserList(Wire):
    users: tuple[UserView, ...] = Field(max_length=100_000)
