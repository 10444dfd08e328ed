"""The names of the checks on a TDX quote, what each establishes, and where its rule is written."""

from __future__ import annotations

_DCAP = "Intel TDX DCAP Quoting Library API, appendix A"
_PCK = "Intel SGX PCK Certificate and CRL Profile Specification"
_PCS = "Intel PCS API version 4"
_ABI = "Intel TDX Module v1.5 ABI Specification"

AUTHENTICATION: dict[str, tuple[str, str]] = {
    "tdx-format": ("The quote is whole and of a known version.", f"{_DCAP}.3, A.4"),
    "tdx-pck-chain": (
        "Intel's authorities issued the platform's key, and each may do what it does.",
        f"{_PCK}; RFC 5280, 6.1",
    ),
    "tdx-root": ("The chain's root is pinned.", "TdxPolicy.roots"),
    "tdx-dates": ("Every certificate of the PCK chain is valid at that moment.", "RFC 5280, 4.1.2.5"),
    "tdx-pck-extension": ("The PCK certificate says which platform it was issued for.", f"{_PCK}, 1.3.5"),
    "tdx-root-crl": (
        "Intel has revoked no authority of these chains, and the list is current.",
        f"{_PCK}; RFC 5280, 6.3",
    ),
    "tdx-pck-crl": ("Intel hasn't revoked the platform's key, and the list is current.", f"{_PCK}; RFC 5280, 6.3"),
    "tdx-qe-report": ("The platform's key signed the quoting enclave's report.", f"{_DCAP}.3.11"),
    "tdx-qe-binding": ("The quoting enclave made the attestation key.", f"{_DCAP}.3.11, QE Report"),
    "tdx-signature": ("The attestation key signed the quote.", f"{_DCAP}.3.8"),
    "tdx-qe-identity-signature": ("Intel signed the QE identity.", f"{_PCS}, Get TDX QE Identity"),
    "tdx-qe-identity-dates": ("The QE identity and its signer are current.", f"{_PCS}, Get TDX QE Identity"),
    "tdx-qe-identity": ("The quoting enclave is Intel's, in production mode.", f"{_PCS}, Enclave Identity"),
    "tdx-qe-level": ("Intel published a level that the quoting enclave reaches.", f"{_PCS}, Enclave Identity"),
    "tdx-tcb-info-signature": ("Intel signed the TCB info.", f"{_PCS}, Get TDX TCB Info"),
    "tdx-tcb-info-dates": ("The TCB info and its signer are current.", f"{_PCS}, Get TDX TCB Info"),
    "tdx-tcb-info": ("The TCB info is that of this platform.", f"{_PCS}, Get TDX TCB Info"),
    "tdx-module": ("The TDX module is Intel's and reaches a level that Intel published.", f"{_PCS}, Get TDX TCB Info"),
    "tdx-tcb-level": ("Intel published a level that the platform reaches.", f"{_PCS}, Get TDX TCB Info"),
}
"""What signatures, chains, bindings, dates and Intel's documents alone must give. name -> (explanation, source)."""

VALIDATION: dict[str, tuple[str, str]] = {
    "tdx-report-data": (
        "The quote was made for this question: it is neither relayed nor replayed.",
        f"{_ABI}, REPORTDATA",
    ),
    "tdx-debug": ("The host can neither debug nor profile the TD.", f"{_ABI}, ATTRIBUTES.TUD and TUP"),
    "tdx-sept-ve": ("The host can't inject a #VE by removing a page.", f"{_ABI}, ATTRIBUTES.SEPT_VE_DISABLE"),
    "tdx-perfmon": ("The TD doesn't share performance counters with its host.", f"{_ABI}, ATTRIBUTES.PERFMON"),
    "tdx-td-attributes": ("No TD attribute is set that the policy doesn't allow.", f"{_ABI}, ATTRIBUTES"),
    "tdx-xfam": ("The TD uses the processor's extended features that the policy allows.", f"{_ABI}, XFAM"),
    "tdx-mrservicetd": ("No service TD that the policy doesn't know is bound.", f"{_ABI}, SERVTD_HASH"),
    "tdx-mrtd": ("The TD began with firmware that the policy names.", "TdxPolicy.mr_td"),
    "tdx-rtmr0": ("The firmware measured a configuration that the policy names.", "TdxPolicy.rtmr0"),
    "tdx-rtmr1": ("The firmware started a system that the policy names.", "TdxPolicy.rtmr1"),
    "tdx-rtmr2": ("The system started with what the policy names.", "TdxPolicy.rtmr2"),
    "tdx-rtmr3": ("What the applications measured is what the policy names.", "TdxPolicy.rtmr3"),
    "tdx-mrconfigid": ("The TD was configured as the policy names.", "TdxPolicy.mr_config_id"),
    "tdx-mrowner": ("The TD belongs to an owner whom the policy names.", "TdxPolicy.mr_owner"),
    "tdx-mrownerconfig": ("Its owner configured the TD as the policy names.", "TdxPolicy.mr_owner_config"),
    "tdx-platform-status": ("Intel's word on the platform's level is acceptable.", "TdxPolicy.platform_tcb"),
    "tdx-module-status": ("Intel's word on the TDX module's level is acceptable.", "TdxPolicy.module_tcb"),
    "tdx-qe-status": ("Intel's word on the quoting enclave's level is acceptable.", "TdxPolicy.qe_tcb"),
    "tdx-tcb-evaluation": ("Intel's documents are of a recent enough evaluation.", "TdxPolicy.minimum_tcb_evaluation"),
    "tdx-fmspc": ("The platform is of a family that is admitted.", "TdxPolicy.fmspcs_allowed, fmspcs_denied"),
    "tdx-collateral": ("Everything that Intel publishes about the platform is there.", "TdxPolicy.collateral"),
}
"""What the policy demands on top. name -> (explanation, source)."""

TDX_CHECKS = AUTHENTICATION | VALIDATION
"""Every appraisal of a quote answers all of these, in this order: name, what it establishes, where it comes from."""
