"""The relay in the guard's place, which also proves itself: real sessions open to it, and its machine may turn bad."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.websockets.auto import AutoWebSocketsProtocol

from cloister import profile
from cloister_attest.evidence import AttestRequest
from cloister_data.consistency import ConsistencyProof, ConsistencyRequest
from cloister_data.identity import LoginAnswer
from tests.fakes.attested_server import FakeMachine
from tests.fakes.kernel_relay import KernelRelay


class ProvenRelay(KernelRelay):
    """Attributes:
    machine: what makes the evidence; tests exchange it.
    bend: what becomes of the evidence on its way out, given the nonce.
    busy: whether it answers requests for evidence with a 503.
    received: every byte that came inside TLS, from all connections, websockets' frames too.
    nonces: of the requests for evidence.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        super().__init__(directory, *options)
        self.good = self.machine = FakeMachine()
        self.bend: Callable[[bytes, bytes], bytes] = lambda _, evidence: evidence
        self.busy = False
        self.received = bytearray()
        self.nonces: list[bytes] = []

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def heal(self) -> None:
        self.machine, self.bend, self.busy = self.good, lambda _, evidence: evidence, False

    def profile(self, name: str, url: str, folder: Path) -> profile.Profile:
        """A signed-in profile that trusts the machine as it is now, at `url`."""
        trust = folder / "trust.toml"
        trust.write_text(self.good.hardware.trust().to_toml())
        made = profile.new(name, url, trust, "ann")
        made.save()
        made.store_token(LoginAnswer(token=self.token, user="ann", role="scientist", expires=int(time.time()) + 3600))
        return made

    def protocols(self) -> dict[str, Any]:
        def recording(kind: Any) -> Any:
            class Recording(kind):  # type: ignore[misc]
                def data_received(_, data: bytes) -> None:  # noqa: N805
                    self.received += data
                    super().data_received(data)

            return Recording

        return {"http": recording(AutoHTTPProtocol), "ws": recording(AutoWebSocketsProtocol)}

    def _app(self) -> FastAPI:
        app = super()._app()

        @app.post("/.well-known/attest")
        async def attest(request: Request) -> Response:
            nonce = AttestRequest.from_json(await request.body()).nonce
            self.nonces.append(nonce)
            # As after the pause between two rounds of a real interval: each begins with a handshake.
            headers = {"connection": "close"}
            if self.busy:
                return Response(b"", 503, headers)
            evidence = self.bend(nonce, self.machine.evidence(self.identity.spki, nonce).to_json())
            return Response(evidence, 200, headers, "application/json")

        @app.post("/.well-known/consistency")
        async def consistency(request: Request) -> Response:
            wanted = ConsistencyRequest.from_json(await request.body())
            shown = ConsistencyProof(hashes=self.machine.log.consistency(wanted.first, wanted.second))
            return Response(shown.to_json(), media_type="application/json")

        return app
