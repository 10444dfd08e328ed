"""What this computer remembers, and that nobody else can read it."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister import profile
from cloister_data.checkpoint import Checkpoint
from cloister_data.errors import AttestationRefusedError, ConfigurationError, StorageError
from cloister_data.identity import LoginAnswer
from tests.fakes.attested_server import FakeLog

KEY = bytes(32)
ANSWER = LoginAnswer(token="t" * 32, user="ann", role="scientist", expires=2_000_000_000)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make(name: str = "hospital", url: str = "https://cloister.example:8443") -> profile.Profile:
    made = profile.new(name, url, "trust.toml", "ann")
    made.save()
    return made


def checkpoint(size: int, root: bytes = b"r" * 32, origin: str = "log") -> Checkpoint:
    return Checkpoint(origin, size, root)


def test_home(folder, monkeypatch):
    assert profile.home() == folder
    monkeypatch.delenv("CLOISTER_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")
    assert profile.home() == Path("/somewhere/cloister")


def test_profiles_are_kept(folder):
    assert profile.names() == []
    made = make()
    other = make("b-clinic")
    assert profile.names() == ["b-clinic", "hospital"]
    assert profile.load("hospital") == made
    assert profile.load("b-clinic") == other
    assert made.trust == Path.cwd() / "trust.toml"
    assert made.address == ("cloister.example", 8443)


def test_how_often_a_machine_proves_itself_is_kept_and_bounded(folder):
    def made(seconds: int) -> profile.Profile:
        return profile.new("hospital", "https://cloister.example", "trust.toml", reattest_seconds=seconds)

    made(30).save()
    assert profile.load("hospital").reattest_seconds == 30
    for wrong in (0, 9, 86401):
        with pytest.raises(ConfigurationError, match="reattest_seconds"):
            made(wrong)
    # One of before there was a choice.
    path = profile.load("hospital").directory / "profile.json"
    document = json.loads(path.read_bytes())
    del document["reattest_seconds"]
    path.write_text(json.dumps(document))
    assert profile.load("hospital").reattest_seconds == 600


def test_a_profile_is_replaced():
    make()
    make(url="https://moved.example")
    assert profile.load("hospital").address == ("moved.example", 443)


@pytest.mark.parametrize("name", ["absent", "../hospital", "", "/", "hospital/", "."])
def test_profiles_that_are_not_there(name):
    make()
    with pytest.raises(ConfigurationError, match=r"There is no cloister called.*cloister connect URL --trust FILE"):
        profile.load(name)


@pytest.mark.parametrize("name", ["../x", "", "A", "a/b", ".hidden", "a" * 64, "a b"])
def test_names_that_are_refused(name):
    with pytest.raises(ConfigurationError, match="its name is wrong"):
        profile.new(name, "https://cloister.example", "trust.toml")


@pytest.mark.parametrize(
    "url",
    [
        "http://cloister.example",
        "cloister.example",
        "https://",
        "https://user:password@cloister.example",
        "https://cloister.example/path",
        "https://cloister.example?query",
        "https://cloister.example#fragment",
        "https://cloister.example:0",
        "https://cloister.example:99999",
        "https://cloister.example:port",
        "ftp://cloister.example",
        "",
    ],
)
def test_addresses_that_are_refused(url):
    with pytest.raises(ConfigurationError, match=r"isn't a cloister's address.*https://host"):
        profile.new("hospital", url, "trust.toml")


@pytest.mark.parametrize(
    ("url", "address", "authority"),
    [
        ("https://cloister.example", ("cloister.example", 443), "cloister.example:443"),
        ("https://cloister.example/", ("cloister.example", 443), "cloister.example:443"),
        ("https://127.0.0.1:8443", ("127.0.0.1", 8443), "127.0.0.1:8443"),
        ("https://[::1]:8443", ("::1", 8443), "[::1]:8443"),
    ],
)
def test_addresses(url, address, authority):
    assert profile.parse_url(url) == address
    assert profile.parse_url(url).authority == authority
    assert profile.new("hospital", url, "trust.toml").address == address


def test_secrets_are_closed_to_others(folder):
    old = os.umask(0)
    try:
        made = make()
        made.store_token(ANSWER)
        made.owner_key(create=True)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.directory.iterdir()}
    assert modes == dict.fromkeys(("profile.json", "token.json", "owner.pem", "lock"), 0o600)
    assert made.directory.stat().st_mode & 0o777 == 0o700


def test_secrets_that_others_can_read_are_refused():
    made = make()
    made.store_token(ANSWER)
    made.owner_key(create=True)
    for name, read in (("token.json", made.token), ("owner.pem", made.owner_key)):
        (made.directory / name).chmod(0o640)
        with pytest.raises(ConfigurationError, match=rf"{name} is open to other users.*chmod 600"):
            read()


def test_tokens():
    made = make()
    assert made.token() is None
    made.store_token(ANSWER)
    assert made.token() == ANSWER
    assert made.model_copy(update={"url": "https://evil.example"}).token() is None
    made.forget_token()
    made.forget_token()
    assert made.token() is None


def test_the_owners_key():
    made = make()
    with pytest.raises(ConfigurationError, match="no key"):
        made.owner_key()
    key = made.owner_key(create=True)
    assert made.owner_key().private_bytes_raw() == key.private_bytes_raw()
    assert made.owner_key(create=True).private_bytes_raw() == key.private_bytes_raw()
    assert make("other").owner_key(create=True).private_bytes_raw() != key.private_bytes_raw()


def test_an_owners_key_that_is_none():
    made = make()
    path = made.directory / "owner.pem"
    path.touch(0o600)
    with pytest.raises(ConfigurationError, match="can't be read"):
        made.owner_key(create=True)
    path.write_bytes(generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigurationError, match="isn't an Ed25519 key"):
        made.owner_key(create=True)


def test_two_processes_make_one_owners_key(folder):
    """The key that the first upload pins must be the one that stays."""
    made = make()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(made.owner_key(create=True).private_bytes_raw())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_checkpoints_only_grow():
    made = make()
    assert made.remembered() is None
    made.remember(checkpoint(5), KEY)
    made.remember(checkpoint(3), KEY)
    assert made.remembered().size == 5
    made.remember(checkpoint(9, b"s" * 32), b"k" * 32)
    assert (made.remembered().size, made.remembered().log_key) == (9, b"k" * 32)
    assert made.model_copy(update={"url": "https://another.example"}).remembered() is None


def test_what_a_log_may_become():
    made = make()
    seen, grown, forked = FakeLog(size=5), FakeLog(size=9), FakeLog(size=9, seed=b"s")
    made.remember(Checkpoint(seen.origin, 5, seen.root), KEY)
    known = made.remembered()
    known.refuse_rollback(Checkpoint(seen.origin, 5, seen.root), ())
    known.refuse_rollback(Checkpoint(seen.origin, 9, grown.root), grown.consistency(5, 9))
    for wrong, proof in (
        (Checkpoint(seen.origin, 4, FakeLog(size=4).root), ()),
        (Checkpoint(seen.origin, 5, b"s" * 32), ()),
        (Checkpoint(seen.origin, 9, grown.root), ()),
        (Checkpoint(seen.origin, 9, grown.root), grown.consistency(4, 9)),
        (Checkpoint(seen.origin, 9, forked.root), forked.consistency(5, 9)),
        (Checkpoint(seen.origin, 9, forked.root), grown.consistency(5, 9)),
        (Checkpoint("another", 9, grown.root), grown.consistency(5, 9)),
    ):
        with pytest.raises(AttestationRefusedError, match="--name NAME"):
            known.refuse_rollback(wrong, proof)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("profile.json", lambda made: profile.load(made.name)),
        ("token.json", profile.Profile.token),
        ("checkpoint.json", profile.Profile.remembered),
    ],
)
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff", b"x" * ((1 << 20) + 1)], ids=["empty", "no", "bytes", "large"]
)
def test_damaged_files_are_refused_never_taken_for_absent(name, read, content):
    made = make()
    made.store_token(ANSWER)
    made.remember(checkpoint(5), KEY)
    (made.directory / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=name):
        read(made)


def test_a_profile_that_calls_itself_something_else():
    made = make()
    (made.directory.parent / "copied").mkdir()
    (made.directory.parent / "copied" / "profile.json").write_bytes(made.to_json())
    with pytest.raises(ConfigurationError, match="damaged"):
        profile.load("copied")


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLOISTER_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="CLOISTER_HOME"):
        make()


def test_no_space_leaves_the_earlier_file_whole(monkeypatch):
    made = make()
    made.store_token(ANSWER)
    before = sorted(path.name for path in made.directory.iterdir())

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        made.store_token(ANSWER.model_copy(update={"token": "u" * 32}))
    assert made.token() == ANSWER
    assert sorted(path.name for path in made.directory.iterdir()) == before


def test_importing_it_loads_nothing_heavy():
    code = "import cloister.session, sys; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert "cloister.session" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "pandas",
        "sqlalchemy",
        "fastapi",
        "cloister_budget.tables",
        "cloister_guard",
    }
