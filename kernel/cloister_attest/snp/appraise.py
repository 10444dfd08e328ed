"""The appraisal of an SEV-SNP report: every check, each answered. Hostile evidence fails checks; it never raises."""

from __future__ import annotations

from collections.abc import Callable

from cloister_attest.outcome import EvidenceError, Outcome, ReportDataUnchecked, not_applicable, passed
from cloister_attest.result import Check, checked
from cloister_attest.snp import abi, validate, verify
from cloister_attest.snp.certificate_table import Collateral
from cloister_attest.snp.explain import SNP_CHECKS
from cloister_attest.snp.policy import SnpPolicy
from cloister_attest.snp.products import Product


def appraise_snp(
    report: bytes,
    collateral: Collateral,
    policy: SnpPolicy,
    *,
    expected_report_data: bytes | ReportDataUnchecked,
    at: int,
) -> tuple[Check, ...]:
    """Make all the checks of `SNP_CHECKS`, whatever the earlier ones came to.

    The report holds where all of them are there and none failed. A check whose ground fails, such as the chip of a
    report that can't be read, fails too.

    Args:
        report: the 1184 bytes, as the firmware made them.
        collateral: the certificates and the revocation list, from the evidence or from elsewhere.
        policy: what is demanded.
        expected_report_data: the 64 bytes that the report must be made for, or why that is checked elsewhere.
        at: the moment to verify at, Unix seconds.
    """
    return _Appraisal(report, collateral, policy, expected_report_data, at).run()


class _Appraisal:
    """One appraisal. What is read once is kept for the other checks."""

    def __init__(
        self, report: bytes, collateral: Collateral, policy: SnpPolicy, expected: bytes | ReportDataUnchecked, at: int
    ) -> None:
        self._bytes, self._collateral, self._policy, self._expected, self._at = report, collateral, policy, expected, at
        self._parsed: abi.Report | None = None
        self._read: verify.Chain | None = None

    def run(self) -> tuple[Check, ...]:
        steps = self._authenticity() | self._judgement()
        return tuple(checked(name, steps[name], *told) for name, told in SNP_CHECKS.items())

    def _authenticity(self) -> dict[str, Callable[[], Outcome]]:
        return {
            "snp-format": self._format,
            "snp-certificates": self._certificates,
            "snp-root": self._root,
            "snp-chain": self._links,
            "snp-roles": self._roles,
            "snp-dates": self._dates,
            "snp-revocation": self._revocation,
            "snp-intermediate": self._intermediate,
            "snp-signing-key": self._signing_key,
            "snp-product": self._product,
            "snp-signer-tcb": self._signer_tcb,
            "snp-chip": self._chip_issued,
            "snp-signature": self._signature,
        }

    def _judgement(self) -> dict[str, Callable[[], Outcome]]:
        policy, platform = self._policy, self._policy.platform_info
        bit, listed = validate.validate_bit, validate.validate_listed
        return {
            "snp-report-data": lambda: validate.validate_report_data(self._report, self._expected),
            "snp-measurement": lambda: listed(self._report.measurement, policy.measurements, "measurement"),
            "snp-debug": lambda: bit(self._report.policy.debug, policy.debug, "DEBUG"),
            "snp-migrate-ma": lambda: bit(self._report.policy.migrate_ma, policy.migrate_ma, "MIGRATE_MA"),
            "snp-smt": lambda: bit(self._report.policy.smt, policy.smt, "SMT"),
            "snp-single-socket": lambda: bit(self._report.policy.single_socket, policy.single_socket, "SINGLE_SOCKET"),
            "snp-cxl-allow": lambda: bit(self._report.policy.cxl_allow, policy.cxl_allow, "CXL_ALLOW"),
            "snp-mem-aes-256-xts": lambda: bit(
                self._report.policy.mem_aes_256_xts, policy.mem_aes_256_xts, "MEM_AES_256_XTS"
            ),
            "snp-rapl-dis": lambda: bit(self._report.policy.rapl_dis, policy.rapl_dis, "RAPL_DIS"),
            "snp-ciphertext-hiding": lambda: bit(
                self._report.policy.ciphertext_hiding_dram, policy.ciphertext_hiding_dram, "CIPHERTEXT_HIDING_DRAM"
            ),
            "snp-page-swap-disable": lambda: bit(
                self._report.policy.page_swap_disable, policy.page_swap_disable, "PAGE_SWAP_DISABLE"
            ),
            "snp-abi": lambda: validate.validate_abi(self._report, policy),
            "snp-vmpl": lambda: validate.validate_vmpl(self._report, policy),
            "snp-host-data": lambda: listed(self._report.host_data, policy.host_data, "host data"),
            "snp-id-key": lambda: listed(self._report.id_key_digest, policy.id_keys, "ID key"),
            "snp-author-key": lambda: validate.validate_author_key(self._report, policy),
            "snp-family-id": lambda: listed(self._report.family_id, policy.family_ids, "family id"),
            "snp-image-id": lambda: listed(self._report.image_id, policy.image_ids, "image id"),
            "snp-guest-svn": lambda: validate.validate_guest_svn(self._report, policy),
            "snp-tcb-order": lambda: validate.validate_tcb_order(self._report, self._product_named),
            "snp-minimum-tcb": lambda: validate.validate_minimum(
                self._report.reported_tcb, self._product_named, policy.minimum_tcb, "reported tcb"
            ),
            "snp-launch-tcb": lambda: validate.validate_minimum(
                self._report.launch_tcb, self._product_named, policy.minimum_launch_tcb, "launch tcb"
            ),
            "snp-minimum-firmware": lambda: validate.validate_firmware(self._report, policy),
            "snp-committed": lambda: validate.validate_committed(self._report, policy),
            "snp-mitigations": lambda: validate.validate_mitigations(self._report, policy),
            "snp-platform-smt": lambda: bit(self._report.platform_info.smt_en, platform.smt_en, "SMT_EN"),
            "snp-platform-tsme": lambda: bit(self._report.platform_info.tsme_en, platform.tsme_en, "TSME_EN"),
            "snp-platform-ecc": lambda: bit(self._report.platform_info.ecc_en, platform.ecc_en, "ECC_EN"),
            "snp-platform-rapl": lambda: bit(self._report.platform_info.rapl_dis, platform.rapl_dis, "RAPL_DIS"),
            "snp-platform-ciphertext-hiding": lambda: bit(
                self._report.platform_info.ciphertext_hiding_dram_en,
                platform.ciphertext_hiding_dram_en,
                "CIPHERTEXT_HIDING_DRAM_EN",
            ),
            "snp-platform-alias-check": lambda: bit(
                self._report.platform_info.alias_check_complete, platform.alias_check_complete, "ALIAS_CHECK_COMPLETE"
            ),
            "snp-platform-tio": lambda: bit(self._report.platform_info.tio_en, platform.tio_en, "TIO_EN"),
            "snp-product-admitted": lambda: validate.validate_product(self._product_named, policy),
            "snp-chip-admitted": lambda: validate.validate_chip(self._report, self._chain, policy),
            "snp-masked-chip": lambda: validate.validate_masked(self._report, policy),
            "snp-vlek": lambda: validate.validate_vlek(self._chain, policy),
        }

    def _format(self) -> Outcome:
        self._parsed = abi.parse(self._bytes)
        return passed(f"the report is whole, of version {self._parsed.version}")

    def _certificates(self) -> Outcome:
        self._read = verify.read_chain(self._collateral)
        return passed("the three certificates are there")

    def _root(self) -> Outcome:
        return passed(f"the root {verify.verify_root(self._chain, self._policy.roots)[:16]}... is pinned")

    def _links(self) -> Outcome:
        verify.verify_links(self._chain)
        return passed("each certificate is signed by the one above it")

    def _roles(self) -> Outcome:
        verify.verify_roles(self._chain)
        return passed("each certificate has the name and the rights of its role")

    def _dates(self) -> Outcome:
        return passed(f"the certificates are valid until {verify.verify_dates(self._chain, self._at):%Y-%m-%d}")

    def _revocation(self) -> Outcome:
        if self._policy.crl == "any":
            return not_applicable("the policy accepts issuers without a look at the revocation list")
        found = verify.verify_not_revoked(self._chain, self._collateral.crl, self._at)
        verify.verify_never_revoked(self._chain, self._collateral.other_crls)
        return passed(f"the root's list of {found.this_update:%Y-%m-%d} doesn't revoke the signer's issuer")

    def _intermediate(self) -> Outcome:
        if self._policy.intermediates == "any":
            return not_applicable("the policy accepts every issuer that the root issued")
        verify.verify_known_intermediate(self._chain)
        return passed("the signer's issuer is one of AMD's")

    def _signing_key(self) -> Outcome:
        kind = verify.verify_signing_key(self._report, self._chain)
        return passed(f"report, signer and issuer say that a {kind} signed")

    def _product(self) -> Outcome:
        return passed(f"everything is of the product {verify.verify_product(self._report, self._chain)}")

    def _signer_tcb(self) -> Outcome:
        verify.verify_signer_tcb(self._report, self._chain)
        return passed("the signer was issued for the firmware reported")

    def _chip_issued(self) -> Outcome:
        verify.verify_chip(self._report, self._chain)
        if self._chain.kind == "VLEK":
            return not_applicable("a cloud provider's key is issued for no chip")
        if self._report.chip_id_masked:
            return passed("the signer names its chip, and the host masks it in the report")
        return passed("the signer was issued for the report's chip")

    def _signature(self) -> Outcome:
        verify.verify_signature(self._report, self._chain)
        return passed("the signer signed the report")

    @property
    def _report(self) -> abi.Report:
        if self._parsed is None:
            raise EvidenceError("not checked, for the report can't be read")
        return self._parsed

    @property
    def _chain(self) -> verify.Chain:
        if self._read is None:
            raise EvidenceError("not checked, for the certificates aren't all there")
        return self._read

    @property
    def _product_named(self) -> Product:
        return self._chain.product
