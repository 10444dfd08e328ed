"""The guard's configuration file: strict TOML, read once at start."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from cloister_attest.policy import AttestationPolicy, load_policy
from cloister_data.base import UserName, Wire
from cloister_data.errors import ConfigurationError
from cloister_data.policy import Platform

MAX_SOCKET_PATH = 107
"""Longest path of a unix socket in bytes (unix(7): sun_path holds 108 with the closing zero)."""

_WHOSE_IMAGE: dict[Platform, tuple[str, ...]] = {
    "simulated": (),
    "sev-snp": ("measurements",),
    "tdx": ("mr_td", "rtmr1", "rtmr2"),
}
"""The keys of a trust file that say which image runs. On TDX: its firmware, what that starts, and with what."""


class Bootstrap(Wire):
    """The first admin, created only while the cloister has no user at all.

    `password_hash` is what `cloister user hash-password` prints.
    """

    admin: UserName
    password_hash: Annotated[str, StringConstraints(pattern=r"^\$argon2id\$.{1,500}$")]


class GuardConfig(Wire):
    """`cloister serve --config FILE`. Unknown keys are errors.

    Attributes:
        listen: `address:port` for HTTPS; port 0 takes a free one.
        state_dir: where the database and the encrypted datasets live; made with mode 0700. Files that leave a
            kernel wait there, without a name: leave 16 GiB free (8 files of 2 GiB at the most).
        runtime_dir: where the unix sockets live: a short path that the kernels' users can traverse, outside state_dir.
        homes_dir: where the users' homes are kept, encrypted; by default `state_dir` with `-homes` at its end. The
            kernel service alone reaches it, and doesn't reach `state_dir`.
        platform: the hardware that proves this machine.
        trust: on real hardware, the trust file that says what a machine that wrote this audit log must have proven, at
            every start: this one, and all earlier ones.
        collateral_dir: where the operator keeps what the processor's maker publishes (`cloister attest fetch-collateral
            --to DIR`): it goes along with the evidence.
        reference_values: what the image's publisher signed; it goes along too, and may be replaced at any time.
        database: an SQLAlchemy URL; by default SQLite in `state_dir`.
        max_queries, max_jobs: how many workers answer questions, and train, at the same time.
        worker_memory_mb: address-space limit of one worker, also of one that reads an upload.
        refusals_per_minute: how many requests of one user may be refused in a minute; more aren't looked at.
        kernels_per_user, kernels_total: how many kernels one user, and all together, may have at the same time.
        kernel_idle_seconds: a kernel is ended, after a warning in its notebook, when no cell has run in it, and nothing
            was asked of it, for so long.
        kernel_memory_mb, kernel_processes, kernel_cpus: what one kernel may use: MiB of memory (with its /tmp and what
            it writes to its home), processes and threads, CPUs (by default all of them).
        home_mb: the quota of a user's home in MiB. It is memory while a kernel of that user runs.
        kernel_pool: how many kernels wait, started and with the usual imports done, for whoever asks next.
        lease_seconds: an owner's data are locked, and jobs on them end, when the owner's witness is silent for so long.
    """

    name: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
    listen: Annotated[str, StringConstraints(pattern=r"^(\[[0-9a-fA-F:]+\]|[0-9A-Za-z.-]+):\d{1,5}$")]
    state_dir: Path
    runtime_dir: Path
    homes_dir: Path | None = None
    platform: Platform
    trust: Path | None = None
    collateral_dir: Path | None = None
    reference_values: Path | None = None
    database: Annotated[str, StringConstraints(max_length=1024)] | None = None
    bootstrap: Bootstrap | None = None
    max_queries: int = Field(default=4, ge=1, le=64)
    max_jobs: int = Field(default=2, ge=1, le=64)
    worker_memory_mb: int = Field(default=16_384, ge=1024, le=1 << 20)
    refusals_per_minute: int = Field(default=60, ge=1, le=10_000)
    kernels_per_user: int = Field(default=8, ge=1, le=100)
    kernels_total: int = Field(default=64, ge=1, le=10_000)
    kernel_idle_seconds: float = Field(default=86_400.0, ge=60, le=2_592_000)
    kernel_memory_mb: int = Field(default=4096, ge=256, le=1 << 22)
    kernel_processes: int = Field(default=1024, ge=64, le=32_768)
    kernel_cpus: float | None = Field(default=None, ge=0.1, le=4096)
    home_mb: int = Field(default=1024, ge=16, le=1 << 20)
    kernel_pool: int = Field(default=0, ge=0, le=64)
    lease_seconds: float = Field(default=30.0, ge=2, le=3600)

    @model_validator(mode="after")
    def _absolute(self) -> Self:
        if not all(path.is_absolute() for path in (self.state_dir, self.runtime_dir, self.homes)):
            raise ValueError("state_dir, runtime_dir and homes_dir must be absolute paths")
        named = (self.trust, self.collateral_dir, self.reference_values)
        if not all(path.is_absolute() for path in named if path is not None):
            raise ValueError("trust, collateral_dir and reference_values must be absolute paths")
        # Kernels reach their sockets; they must never reach what lies in the state directory.
        if self.runtime_dir.is_relative_to(self.state_dir):
            raise ValueError("runtime_dir must lie outside state_dir")
        return self

    @model_validator(mode="after")
    def _who_writes_the_log(self) -> Self:
        if self.platform == "simulated" and self.trust is not None:
            raise ValueError("simulated hardware says itself who may write its audit log: trust is for real hardware")
        if self.platform != "simulated" and self.trust is None:
            raise ValueError(
                "real hardware needs a trust file: trust = what a machine that wrote this audit log must have proven"
            )
        return self

    def writers(self) -> AttestationPolicy | None:
        """What a machine that wrote this audit log must have proven; None on simulated hardware, which says it itself.

        Raises ConfigurationError where the trust file can't be read, is for another platform, or would let anybody's
        machine write the log.
        """
        if self.trust is None:
            return None
        policy = load_policy(self.trust)
        if policy.platform != self.platform:
            raise ConfigurationError(
                f"The trust file {self.trust} is for {policy.platform}, and the configuration for {self.platform}.",
                why="Only evidence of the platform that it names is believed.",
                next_step="Set the platform that this machine has, and a trust file for it.",
            )
        hardware = policy.hardware
        for key in _WHOSE_IMAGE[self.platform]:
            if getattr(hardware, key) == "any":
                raise ConfigurationError(
                    f'The trust file {self.trust} says {key} = "any".',
                    why="Then anybody could run any image on such a machine, and forge this audit log with it.",
                    next_step='List what the image measures (cloister attest measure), or set "published" and name its '
                    "publisher.",
                )
        if hardware.debug == "any":
            raise ConfigurationError(
                f'The trust file {self.trust} says debug = "any".',
                why="A host reads the keys out of a machine that it may debug, and could forge this audit log.",
                next_step='Set debug = "forbidden".',
            )
        return policy

    @property
    def host(self) -> str:
        return self.listen.rsplit(":", 1)[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.listen.rsplit(":", 1)[1])

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.state_dir / 'cloister.db'}"

    @property
    def homes(self) -> Path:
        return self.homes_dir or Path(f"{self.state_dir}-homes")

    @property
    def control_socket(self) -> Path:
        return self.runtime_dir / "control.sock"

    @property
    def service_socket(self) -> Path:
        return self.runtime_dir / "kernels.sock"

    def kernel_socket(self, kernel: str) -> Path:
        return self.runtime_dir / "g" / kernel / "guard.sock"

    def make_directories(self) -> None:
        """Make what is missing, closed to everyone else. Raises ConfigurationError."""
        longest = self.kernel_socket("0" * 32)
        if len(os.fsencode(longest)) > MAX_SOCKET_PATH:
            raise ConfigurationError(
                f"The runtime directory's path is too long: {self.runtime_dir}",
                why=f"Unix socket paths end at {MAX_SOCKET_PATH} bytes, and a kernel's would have "
                f"{len(os.fsencode(longest))}.",
                next_step="Set runtime_dir to a short path, for example /run/cloister.",
            )
        for path in (self.state_dir, self.runtime_dir, self.homes):
            if path.exists() and path.stat().st_mode & 0o002:
                raise ConfigurationError(
                    f"{path} is open to every user of this machine.",
                    why="A cloister closes its directories to others, which would break what else uses this one.",
                    next_step="Name a directory of the cloister's own, for example one below it.",
                )
        try:
            for path, mode in (
                (self.state_dir, 0o700),
                (self.state_dir / "data", 0o700),
                (self.state_dir / "models", 0o700),
                (self.runtime_dir, 0o711),
                (self.runtime_dir / "g", 0o711),
            ):
                path.mkdir(parents=True, exist_ok=True)
                path.chmod(mode)
        except OSError as error:
            raise ConfigurationError(
                f"The state directory can't be used: {self.state_dir}",
                why=f"{error.strerror}.",
                next_step="Choose a directory that this user may write to, with free space, as state_dir.",
            ) from error


def load_config(path: Path) -> GuardConfig:
    """Read and check a configuration file. Raises ConfigurationError that names the file and the first wrong key."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
        return GuardConfig.model_validate(document)
    except OSError as error:
        raise ConfigurationError(
            f"The configuration {path} can't be read.", why=f"{error.strerror}.", next_step="Check the path."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"The configuration {path} isn't TOML.", why=f"{error}.") from error
    except ValidationError as error:
        # A misspelt key is both unknown and missing under its right name: the first of the two says more.
        found = error.errors(include_url=False, include_input=False)
        first = min(found, key=lambda each: each["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigurationError(
            f"The configuration {path} is wrong at {key!r}.",
            why=f"{first['msg']}.",
            next_step="deploy/cloister.toml is a commented sample.",
        ) from error
