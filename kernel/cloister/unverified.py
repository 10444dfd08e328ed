"""The evidence of a machine that nobody has judged yet. Nothing of it is believed, and nothing secret is sent."""

from __future__ import annotations

import httpx
from pydantic import ValidationError

from cloister.profile import parse_url
from cloister.session import ATTEST_PATH, CONNECT_TIMEOUT, EVIDENCE_TIMEOUT
from cloister.transport import Transport
from cloister_attest.channel import fetch_certificate, pinned_context
from cloister_attest.evidence import MAX_EVIDENCE_JSON, AttestRequest, Evidence
from cloister_data.errors import AttestationRefusedError, CloisterError, UnreachableError


def show(url: str) -> Evidence:
    """What whoever answers at `url` (`https://host[:port]`) shows for a fresh nonce, sent without a token.

    It serves to learn what an appraisal would take, never to connect. Raises ConfigurationError for a wrong address,
    UnreachableError, and AttestationRefusedError where the answer is no evidence.
    """
    address = parse_url(url)
    context = pinned_context(fetch_certificate(address.host, address.port, CONNECT_TIMEOUT))
    with httpx.Client(
        base_url=f"https://{address.authority}", verify=context, trust_env=False, follow_redirects=False
    ) as client:
        try:
            answer = Transport(client).raw(
                "POST", ATTEST_PATH, AttestRequest.fresh(), limit=MAX_EVIDENCE_JSON, timeout=EVIDENCE_TIMEOUT
            )
            return Evidence.from_json(answer)
        except (UnreachableError, AttestationRefusedError):
            raise
        except (CloisterError, ValidationError) as error:
            # What an unproven machine says is not shown to anybody.
            raise AttestationRefusedError(
                f"{url} shows no evidence.",
                why="Its answer to the request for evidence was a refusal, too large, or can't be read.",
                next_step="Check that the address is a cloister's.",
            ) from error
