"""docs/protocol.md says what the code does: every vector is recomputed, every table compared."""

from __future__ import annotations

import base64
import json
import re
from typing import get_args

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import APIRouter
from fastapi.routing import APIRoute
from starlette.routing import WebSocketRoute

from cloister_attest.binding import LABEL, gpu_digest, report_data
from cloister_attest.checks import AFTER, BEFORE, PLATFORM_CHECKS
from cloister_attest.collateral.items import MAX_ITEMS, Item, Kind
from cloister_attest.evidence import MAX_EVIDENCE_JSON, Evidence
from cloister_attest.policy import FORMAT, MAX_TRUST_FILE, AttestationPolicy
from cloister_attest.reference_values import (
    MAX_ENVELOPE,
    PAYLOAD_TYPE,
    PREDICATE_TYPE,
    Publisher,
    ReferenceValues,
    sign_reference_values,
    verify_reference_values,
)
from cloister_attest.simulated import abi
from cloister_data import errors, framing
from cloister_data.checkpoint import verify_checkpoint
from cloister_data.control import ControlOrder
from cloister_data.cosignature import cosign, verify_cosignature, witness_name
from cloister_data.errors import CloisterError
from cloister_data.events import Event
from cloister_data.framing import Channel, ChannelFrame, FrameKind, Slice, pack_body, pack_frame
from cloister_data.kernels import KernelLaunch, KernelOrder
from cloister_data.owner import public_bytes, sign_policy, sign_statement
from cloister_data.policy import POLICY_LABEL, Platform, Policy
from cloister_data.populations import MAX_OTHERS, POPULATION_LABEL, PopulationStatement
from cloister_data.terms import GAP_LABEL, TERMS_LABEL
from cloister_data.witness import WITNESS_LABEL
from tests.fakes.documents import ROOT, table, vectors

PROTOCOL = ROOT / "docs" / "protocol.md"
TEXT = PROTOCOL.read_text("utf-8")
VECTORS = vectors(PROTOCOL)


def hexes(name: str, *keys: str) -> tuple[bytes, ...]:
    return tuple(bytes.fromhex(VECTORS[name][key]) for key in keys)


def test_every_vector_has_a_test() -> None:
    assert set(VECTORS) == {
        "frame",
        "body",
        "report-data",
        "checkpoint",
        "reference-values",
        "policy",
        "policy-format-1",
        "population",
        "cosignature",
        "channel-frames",
    }


def test_frame() -> None:
    payload, frame = hexes("frame", "payload", "frame")
    assert pack_frame(payload) == frame


def test_body() -> None:
    head, blob, body = hexes("body", "head", "blob", "body")
    assert pack_body(head, blob) == body


def test_frame_limits() -> None:
    for limit in (framing.MAX_JSON_FRAME, framing.MAX_CHANNEL_FRAME, framing.MAX_SLICE, framing.MAX_CHANNEL_MESSAGE):
        assert f"{limit:,}".replace(",", " ") in TEXT


def test_report_data() -> None:
    spki, nonce, log_key = hexes("report-data", "spki", "nonce", "log_key")
    vector = VECTORS["report-data"]
    note = VECTORS["checkpoint"]["note"].encode()
    assert f"`{LABEL.decode()}` ({len(LABEL)} bytes, ASCII)" in TEXT
    assert report_data(spki, nonce, gpu_digest(None), note, log_key).hex() == vector["report_data"]
    with_gpu = report_data(spki, nonce, gpu_digest(bytes.fromhex("677075")), note, log_key)
    assert with_gpu.hex() == vector["report_data with gpu 677075"]


def test_checkpoint() -> None:
    vector = VECTORS["checkpoint"]
    seed, log_key = hexes("checkpoint", "seed", "log_key")
    assert Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw() == log_key
    checkpoint = verify_checkpoint(vector["note"], log_key)
    assert (checkpoint.origin, str(checkpoint.size)) == (vector["origin"], vector["size"])


def test_cosignature() -> None:
    vector = VECTORS["cosignature"]
    seed, key = hexes("cosignature", "seed", "key")
    checkpoint = verify_checkpoint(VECTORS["checkpoint"]["note"], hexes("checkpoint", "log_key")[0])
    signing = Ed25519PrivateKey.from_private_bytes(seed)
    assert cosign(checkpoint, vector["name"], signing, int(vector["time"])) == vector["line"]
    assert verify_cosignature(checkpoint, vector["line"], vector["name"], key) == int(vector["time"])
    assert vector["name"] == witness_name("hospital-a")
    for label in (TERMS_LABEL, GAP_LABEL, WITNESS_LABEL):
        assert f"`{label.decode().strip()}`" in TEXT


@pytest.mark.parametrize("name", ["policy", "policy-format-1"])
def test_policy(name: str) -> None:
    vector = VECTORS[name]
    seed, owner_key = hexes(name, "seed", "owner_key")
    key = Ed25519PrivateKey.from_private_bytes(seed)
    signed = sign_policy(Policy.from_json(vector["document"]), key)
    assert signed.document.decode() == vector["document"]
    assert signed.signature.hex() == vector["signature"]
    assert public_bytes(key) == owner_key
    assert POLICY_LABEL == b"cloister/policy/v1\n"


def test_population() -> None:
    vector = VECTORS["population"]
    seed, owner_key = hexes("population", "seed", "owner_key")
    key = Ed25519PrivateKey.from_private_bytes(seed)
    signed = sign_statement(PopulationStatement.from_json(vector["document"]), key)
    assert signed.document.decode() == vector["document"]
    assert signed.signature.hex() == vector["signature"]
    assert public_bytes(key) == owner_key
    assert POPULATION_LABEL == b"cloister/population/v1\n"
    rows = table(PROTOCOL, "statement's key")
    assert [row[0] for row in rows] == list(PopulationStatement.model_fields)
    assert f"1 to {MAX_OTHERS}" in rows[2][1]


@pytest.mark.parametrize("line", VECTORS["channel-frames"].items(), ids=lambda line: line[0].split()[0])
def test_channel_frames(line: tuple[str, str]) -> None:
    described = re.fullmatch(r"([A-Z]+)( further| last)? ([a-z]+) (\d+) (\d+) \[(.*)\]", line[0])
    assert described is not None
    kind, slice, channel, sequence, acknowledged, parts = described.groups()
    frame = ChannelFrame(
        FrameKind[kind],
        Channel[channel.upper()],
        int(sequence),
        int(acknowledged),
        tuple(bytes.fromhex(part) for part in parts.split(",")) if parts else (),
        Slice[(slice or " whole").strip().upper()],
    )
    assert frame.pack().hex() == line[1]


def test_kinds_and_channels_of_frames() -> None:
    assert ", ".join(f"{kind.value} {kind.name}" for kind in FrameKind) in TEXT
    assert ", ".join(f"{channel.value} {channel.name.lower()}" for channel in Channel) in TEXT
    assert "0 for a whole message, 1 for a slice, 2 for its last slice" in TEXT
    assert [slice.value for slice in Slice] == [0, 1, 2]
    assert f"at most {framing.MAX_PARTS}" in TEXT


def test_simulated_report() -> None:
    rows = table(PROTOCOL, "offset")
    assert [int(row[0]) for row in rows] == [sum(int(row[1]) for row in rows[:place]) for place in range(len(rows))]
    assert sum(int(row[1]) for row in rows) == abi.REPORT_BYTES == 304
    body = abi.pack_body(debug=True, measurement=b"m" * 48, report_data=b"r" * 64, chip_id=b"c" * 64, tcb=7)
    report = body + abi.pack_signature(3, 4)
    starts = {row[2].split(",")[0].split(";")[0]: int(row[0]) for row in rows}
    assert report[starts["measurement"] :].startswith(b"m" * 48 + b"r" * 64 + b"c" * 64)
    assert report[starts["policy flags"] + 7] == 1
    assert report[starts["tcb"] + 7] == 7
    assert (report[starts["signature r"] + 47], report[starts["signature s"] + 47]) == (3, 4)


def test_evidence_fields() -> None:
    assert [row[0] for row in table(PROTOCOL, "field") if row[0] in Evidence.model_fields] == list(
        Evidence.model_fields
    )
    rows = table(PROTOCOL, "key of an item")
    assert [row[0] for row in rows] == list(Item.model_fields)
    assert rows[0][1] == ", ".join(get_args(Kind))
    assert f"at most {MAX_ITEMS} items" in TEXT
    assert f"reads at most {MAX_EVIDENCE_JSON >> 20} MiB" in TEXT


def _rows(checks: dict[str, tuple[str, str]]) -> list[list[str]]:
    return [[name, *told] for name, told in checks.items()]


def test_checks_of_every_machine() -> None:
    assert table(PROTOCOL, "check before") == _rows(BEFORE)
    assert table(PROTOCOL, "check after") == _rows(AFTER)


@pytest.mark.parametrize("platform", get_args(Platform))
def test_checks_of_a_platform(platform: Platform) -> None:
    assert table(PROTOCOL, f"check of {platform}") == _rows(PLATFORM_CHECKS[platform])


def test_trust_file() -> None:
    rows = [row for row in table(PROTOCOL, "key") if row[0] in AttestationPolicy.model_fields]
    assert [row[0] for row in rows] == list(AttestationPolicy.model_fields)
    assert rows[0][1] == str(FORMAT)
    assert ", ".join(Publisher.model_fields) in rows[1][1]
    assert f"at most {MAX_TRUST_FILE >> 20} MiB, format {FORMAT}" in TEXT


def test_reference_values() -> None:
    vector = VECTORS["reference-values"]
    seed, key = hexes("reference-values", "seed", "key")
    signing = Ed25519PrivateKey.from_private_bytes(seed)
    assert signing.public_key().public_bytes_raw() == key
    values = ReferenceValues.from_json(vector["predicate"])
    envelope = sign_reference_values(values, vector["artifact"], signing)
    made = json.loads(envelope)
    assert base64.b64decode(made["payload"]).decode() == vector["payload"]
    assert [each["sig"] for each in made["signatures"]] == [vector["sig"]]
    publisher = Publisher(key=key.hex(), image="cloister", minimum_version="1.4")
    assert verify_reference_values(envelope, publisher, values.issued) == values
    assert [row[0] for row in table(PROTOCOL, "key of the predicate")] == list(ReferenceValues.model_fields)
    assert all(f"`{name}`" in TEXT for name in (PAYLOAD_TYPE, PREDICATE_TYPE))
    assert f"at most {MAX_ENVELOPE >> 10} KiB" in TEXT


def test_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CloisterError)]
    known = {kind.code: str(kind.status) for kind in kinds if kind is not CloisterError}
    assert {row[0]: row[1] for row in table(PROTOCOL, "code")} == known


def test_events() -> None:
    bodies = get_args(Event.model_fields["body"].annotation)
    assert [row[0] for row in table(PROTOCOL, "kind")] == [body.model_fields["kind"].default for body in bodies]


def _ops(orders: object) -> set[str]:
    """The values of `op` that a union of orders takes."""
    kinds = get_args(get_args(orders)[0])
    return {op for kind in kinds for op in get_args(kind.model_fields["op"].annotation)}


def _ops_in(section: str) -> set[str]:
    """The names in the first column of a section's table, without its heading."""
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {op for row in rows[1:] for op in re.findall(r"`([a-z]+)`", row)}


def test_orders() -> None:
    service, control = TEXT.split("### The service socket")[1].split("### The control socket")
    assert _ops_in(service) == _ops(KernelOrder)
    assert _ops_in(control) == _ops(ControlOrder)


def test_figures_in_the_text() -> None:
    from cloister.errands import METADATA
    from cloister_data.transfers import MAX_PATH, MAX_TRANSFER_BYTES, MAX_TRANSFER_FRAME
    from cloister_guard.companion import MEET_SECONDS
    from cloister_guard.events import KEPT
    from cloister_guard.http.messages import MAX_JSON_BODY
    from cloister_guard.kernels import SUBPROTOCOL
    from cloister_kernel.endings import MAX_TEXT
    from cloister_kernel.holdings import KERNEL_BYTES, RESERVED_BYTES, SERVICE_BYTES
    from cloister_kernel.kernels import GUARD_AWAY_SECONDS
    from cloister_kernel.link import STREAM_SECONDS
    from cloister_kernel.pump import ACK_AFTER_SECONDS, ACK_EVERY_FRAMES

    assert f"after {ACK_EVERY_FRAMES} frames or {ACK_AFTER_SECONDS} seconds" in TEXT
    assert f"{KEPT:,}".replace(",", " ") + " events ago" in TEXT
    assert f"at most {MAX_JSON_BODY >> 20} MiB" in TEXT
    assert f"at most {KERNEL_BYTES >> 20} MiB for one kernel and {SERVICE_BYTES >> 20} MiB for all" in TEXT
    assert f"{RESERVED_BYTES >> 20} MiB are" in TEXT
    assert f"within {STREAM_SECONDS * 1000:.0f} ms" in TEXT
    assert f"`{SUBPROTOCOL}`" in TEXT
    assert f"sent every {MEET_SECONDS:.0f} seconds" in TEXT
    assert f"no guard has met for {GUARD_AWAY_SECONDS // 60:.0f} minutes" in TEXT
    assert f"at most {MAX_TEXT} characters" in " ".join(TEXT.split())
    assert f"1 to {MAX_PATH} printable characters" in TEXT
    assert f"A file has at most {MAX_TRANSFER_BYTES >> 30} GiB" in TEXT
    assert f"in frames of at most {MAX_TRANSFER_FRAME >> 20} MiB" in TEXT
    assert f"`Outcome` under `{METADATA}` in its metadata" in TEXT


def test_launch_environment() -> None:
    names = get_args(get_args(KernelLaunch.model_fields["environment"].annotation)[0])
    assert ", ".join(f"`{name}`" for name in names) in TEXT


def _routes(router: APIRouter) -> set[str]:
    found = set()
    for route in router.routes:
        if isinstance(route, APIRoute):
            found |= {f"{method} {route.path}" for method in route.methods}
        elif isinstance(route, WebSocketRoute):
            found.add(f"WEBSOCKET {route.path}")
    return found


def test_routes() -> None:
    from cloister_guard.http import audit, files, laptop, metrics, scientist

    guard: object = None  # The routes close over it; none is called here.
    offered_to_kernels = _routes(scientist.make_router(guard, lambda: None))  # type: ignore[arg-type]
    https_only = _routes(laptop.make_router(guard))  # type: ignore[arg-type]
    for part in (audit, files, metrics):
        https_only |= _routes(part.make_router(guard, lambda: None))  # type: ignore[arg-type]
    rows = table(PROTOCOL, "route")
    assert {row[0] for row in rows} == offered_to_kernels | https_only
    assert {row[0] for row in rows if row[2] == "yes"} == offered_to_kernels
    assert len(rows) == len({row[0] for row in rows})
