"""Checkpoints as C2SP describes them: a vector of the format's authors, and everything that must not pass."""

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister_data.checkpoint import Checkpoint, CheckpointError, key_id, sign_checkpoint, verify_checkpoint
from tests.fakes.attested_server import FakeLog

LOG = FakeLog()


def signed(body: str, log: FakeLog = LOG, name: str | None = None) -> str:
    name = log.origin if name is None else name
    value = key_id(name, log.public_key) + log.key.sign(body.encode())
    return f"{body}\n— {name} {base64.b64encode(value).decode()}\n"


def body(origin: str = LOG.origin, size: str = "7", root: bytes = b"r" * 32, more: str = "") -> str:
    return f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n{more}"


def test_the_key_id_of_the_formats_authors():
    # golang.org/x/mod/sumdb/note, package documentation: PeterNeumann+c74f20a3+ARpc2QcU...
    key = base64.b64decode("ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    assert key[0] == 1
    assert key_id("PeterNeumann", key[1:]).hex() == "c74f20a3"


def test_a_checkpoint_is_read():
    assert verify_checkpoint(LOG.checkpoint(), LOG.public_key) == Checkpoint(LOG.origin, 7, LOG.root)


def test_an_empty_log_has_the_hash_of_nothing_for_a_root():
    empty = FakeLog(size=0)
    assert verify_checkpoint(empty.checkpoint(), empty.public_key).size == 0
    with pytest.raises(CheckpointError, match="root hash"):
        verify_checkpoint(signed(body(size="0")), LOG.public_key)


def test_witnesses_may_sign_beside_the_log():
    witness = FakeLog(origin="witness")
    cosignature = base64.b64encode(key_id("witness", witness.public_key) + b"w" * 72).decode()
    note = LOG.checkpoint() + f"— witness {cosignature}\n"
    assert verify_checkpoint(note, LOG.public_key).size == 7


def test_extension_lines_are_allowed():
    assert verify_checkpoint(signed(body(more="extension\n")), LOG.public_key).size == 7


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        ("", "signed note"),
        ("x", "signed note"),
        (body(), "signed note"),
        (LOG.checkpoint().rstrip("\n"), "signed note"),
        (LOG.checkpoint().replace("\n7\n", "\n8\n"), "doesn't verify"),
        (signed(body(size="07")), "decimal"),
        (signed(body(size="-1")), "decimal"),
        (signed(body(size="٣")), "decimal"),
        (signed(body(size=str(2**63))), "decimal"),
        (signed(body(root=b"short")), "root hash"),
        (signed(body().replace("=", "")), "base64"),
        (signed(body(more="\n")), "three lines"),
        (signed("only\n7\n"), "three lines"),
        (signed(body(origin="a\tb"), name="a"), "control"),
        (signed(body(), name="somebody-else"), "0 signatures"),
        (signed(body()) + signed(body()).split("\n\n")[1], "2 signatures"),
        (signed(body()) + "not a signature\n", "malformed"),
        (signed(body()) + "— w AAAA\n" * 40, "more than"),
    ],
)
def test_what_is_refused(note, reason):
    with pytest.raises(CheckpointError, match=reason):
        verify_checkpoint(note, LOG.public_key)


def test_another_key_is_refused():
    with pytest.raises(CheckpointError, match="0 signatures"):
        verify_checkpoint(LOG.checkpoint(), FakeLog().public_key)


def test_a_signature_by_another_key_under_this_keys_id_is_refused():
    other = Ed25519PrivateKey.generate()
    text = body()
    value = key_id(LOG.origin, LOG.public_key) + other.sign(text.encode())
    with pytest.raises(CheckpointError, match="doesn't verify"):
        verify_checkpoint(f"{text}\n— {LOG.origin} {base64.b64encode(value).decode()}\n", LOG.public_key)


@given(st.text(max_size=200), st.binary(min_size=32, max_size=32))
def test_hostile_notes_only_ever_raise_the_one_error(note, key):
    with pytest.raises(CheckpointError):
        verify_checkpoint(note, key)


@given(st.data())
def test_no_changed_character_survives(data):
    note = LOG.checkpoint()
    at = data.draw(st.integers(0, len(note) - 1))
    char = data.draw(st.characters(codec="utf-8").filter(lambda char: char != note[at]))
    with pytest.raises(CheckpointError):
        verify_checkpoint(note[:at] + char + note[at + 1 :], LOG.public_key)


KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
GOLDEN = Checkpoint("hospital.example/log", 42, hashlib.sha256(b"root").digest())
NOTE = sign_checkpoint(GOLDEN, KEY)


def test_the_note_is_built_as_the_specifications_say() -> None:
    """c2sp.org/tlog-checkpoint: three lines; c2sp.org/signed-note: a blank line, then em dash, name, base64."""
    root = base64.b64encode(GOLDEN.root).decode()
    identifier = hashlib.sha256(b"hospital.example/log\n\x01" + PUBLIC).digest()[:4]
    body = f"hospital.example/log\n42\n{root}\n"
    signature = base64.b64encode(identifier + KEY.sign(body.encode())).decode()
    assert body + f"\n\u2014 hospital.example/log {signature}\n" == NOTE
    assert verify_checkpoint(NOTE, PUBLIC) == GOLDEN
    assert key_id("hospital.example/log", PUBLIC) == identifier


def test_a_checkpoint_is_small():
    with pytest.raises(CheckpointError, match="large"):
        verify_checkpoint(NOTE + "\u2014 x\n" * 3000, PUBLIC)
