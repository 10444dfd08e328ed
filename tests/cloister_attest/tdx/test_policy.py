"""The policy: every field is there, and nothing is accepted but by the explicit word."""

import pytest
from pydantic import ValidationError

from cloister_attest.tdx.collateral import Collateral
from cloister_attest.tdx.policy import TD_ATTRIBUTES_KNOWN, XFAM_KNOWN, TdxPolicy
from tests.cloister_attest.tdx import minting as m


@pytest.mark.parametrize("name", TdxPolicy.model_fields)
def test_every_field_of_the_policy_is_mandatory(name):
    fields = m.strict().model_dump()
    assert TdxPolicy(**fields) == m.strict()
    del fields[name]
    with pytest.raises(ValidationError):
        TdxPolicy(**fields)


@pytest.mark.parametrize(
    "wrong",
    [
        {"roots": "any"},
        {"roots": ()},
        {"extra": 1},
        {"platform_tcb": ("Revoked",)},
        {"mr_td": ()},
        {"mr_td": ("AA" * 48,)},
        {"collateral": "none"},
        {"xfam_allowed": "0x3"},
        {"minimum_tcb_evaluation": "18"},
        {"fmspcs_denied": "any"},
    ],
)
def test_wrong_policies(wrong):
    with pytest.raises(ValidationError):
        m.strict(**wrong)


def test_policy_and_collateral_survive_the_wire():
    assert TdxPolicy.from_json(m.strict().to_json()) == m.strict()
    assert Collateral.from_json(m.collateral().to_json()) == m.collateral()


def test_the_known_attributes_are_the_specifications():
    bits = {bit for bit in range(64) if int(TD_ATTRIBUTES_KNOWN, 16) >> bit & 1}
    assert bits == {0, 4, 5, 6, 16, 27, 28, 29, 30, 31, 62, 63}
    # No MPX (3, 4), PASID (10), HDC (13) or HWP (16): the TDX module has a TD go without.
    assert {bit for bit in range(64) if int(XFAM_KNOWN, 16) >> bit & 1} == {
        *range(3),
        *range(5, 10),
        11,
        12,
        14,
        15,
        17,
        18,
    }
