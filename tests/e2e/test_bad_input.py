"""What goes wrong around a cloister, as users see it on the command line: clear words, status 1, nothing lost."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cloister_attest.policy import AttestationPolicy
from cloister_data.accounts import AccountList
from cloister_data.datasets import DatasetList
from tests.cloister_attest.policies import SNP_POLICY
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy, running_cloister, write_config


def cloister(*arguments: str, home: Path, text: str = "", status: int = 1) -> str:
    """Run the command; its output, on one line."""
    done = subprocess.run(
        [sys.executable, "-m", "cloister_cli.main", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"CLOISTER_HOME": os.fspath(home), "COLUMNS": "500"},
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == status, said
    assert "Traceback" not in said
    return said


def connect(found: RunningCloister, home: Path, trust: Path | None = None, password: str = "", status: int = 1) -> str:
    return cloister(
        "connect", found.url, "--trust", os.fspath(trust or found.trust), "--user", "admin", "--password-stdin",
        home=home, text=password, status=status,
    )  # fmt: skip


def test_a_cloister_that_is_down(tmp_path: Path) -> None:
    trust = tmp_path / "trust.toml"
    with running_cloister() as own:
        trust.write_bytes(own.trust.read_bytes())
        connect(own, tmp_path, trust, own.passwords["admin"], status=0)
        own.stop()
        said = connect(own, tmp_path, trust, own.passwords["admin"])
        assert own.url.removeprefix("https://") in said
        assert "user list" not in said
        assert cloister("user", "list", home=tmp_path)


def test_a_wrong_password(shared_cloister: RunningCloister, tmp_path: Path) -> None:
    said = connect(shared_cloister, tmp_path, password="not the password")
    assert "name or the password is wrong" in said


def test_a_trust_file_that_demands_real_hardware_refuses_the_demos_cloister(
    shared_cloister: RunningCloister, tmp_path: Path
) -> None:
    trust = tmp_path / "real.toml"
    text = shared_cloister.trust.read_text()
    demanding = AttestationPolicy.from_toml(text).model_copy(update={"hardware": SNP_POLICY})
    trust.write_text(demanding.to_toml())
    trust.chmod(0o600)
    said = connect(shared_cloister, tmp_path, trust, shared_cloister.passwords["admin"])
    assert "Nothing was sent" in said
    assert "platform" in said
    assert "simulated" in said


def test_an_expired_session_says_how_to_sign_in_again(tmp_path: Path) -> None:
    with running_cloister() as own:
        connect(own, tmp_path, password=own.passwords["admin"], status=0)
        cloister("user", "list", home=tmp_path, status=0)
        database = sqlite3.connect(own.state / "cloister.db")
        database.execute("UPDATE tokens SET expires = ?", (int(time.time()) - 1,))
        database.commit()
        database.close()
        assert "cloister connect" in cloister("user", "list", home=tmp_path)


def test_a_port_in_use(shared_cloister: RunningCloister, tmp_path: Path) -> None:
    address = shared_cloister.url.removeprefix("https://")
    config = write_config(tmp_path, tmp_path.parent / "r", listen=address)
    said = cloister("serve", "--config", os.fspath(config), home=tmp_path)
    assert address in said
    assert "Another program uses that port" in said


def test_a_database_of_a_newer_version(tmp_path: Path) -> None:
    with running_cloister() as own:
        own.stop()
        database = sqlite3.connect(own.state / "cloister.db")
        database.execute("UPDATE alembic_version SET version_num = '9999'")
        database.commit()
        database.close()
        said = cloister("serve", "--config", os.fspath(own.base / "cloister.toml"), home=tmp_path)
        assert "newer" in said


def test_no_space_left_loses_nothing(tmp_path: Path) -> None:
    """The state directory on a file system of a few megabytes of its own: full in the middle of an upload."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small file system that this test fills")
    state = tmp_path / "state"
    state.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m,mode=0700", "tmpfs", os.fspath(state)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine doesn't let root mount a tmpfs")
    try:
        with running_cloister(state=state) as own:
            own.add_user("ann", "scientist")
            own.upload("small/people", people(50), PEOPLE, make_policy("small/people", {"ann": 1.0}))
            ann = own.session("ann").transport
            before = ann.call("GET", "/accounts", None, AccountList)
            with pytest.raises(Exception, match=r"[Ss]pace|disk|stored") as caught:
                own.upload("small/large", people(200_000), PEOPLE, make_policy("small/large", {"ann": 1.0}))
            assert caught.value.code == "storage-failed"  # type: ignore[attr-defined]
            names = [view.name for view in ann.call("GET", "/datasets", None, DatasetList).datasets]
            assert names == ["small/people"]
            assert ann.call("GET", "/accounts", None, AccountList) == before
            # Room again: the same upload's smaller sister goes through.
            own.upload("small/other", people(60), PEOPLE, make_policy("small/other", {"ann": 1.0}))
            assert own.stop() == 0
    finally:
        subprocess.run(["umount", "-l", os.fspath(state)], check=True)
