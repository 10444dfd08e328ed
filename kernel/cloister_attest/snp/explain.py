"""The names of the checks on an SEV-SNP report, what each establishes, and where its rule is written."""

from __future__ import annotations

AUTHENTICITY: dict[str, tuple[str, str]] = {
    "snp-format": ("The report is whole and of a known version.", "AMD 56860, ATTESTATION_REPORT"),
    "snp-certificates": ("The signer's certificate, its issuer's and the root's are there.", "AMD 57230; RFC 5280, 4"),
    "snp-root": ("The root is pinned.", "policy: roots"),
    "snp-chain": ("The root issued the signer's issuer, and that the signer.", "AMD 57230, VCEK Certificate"),
    "snp-roles": ("Each certificate has AMD's name for its role, and may do no more.", "AMD 57230, VCEK Certificate"),
    "snp-dates": ("Every certificate is valid at the moment of the appraisal.", "RFC 5280, 4.1.2.5"),
    "snp-revocation": ("The root hasn't revoked the signer's issuer.", "RFC 5280, 5; policy: crl"),
    "snp-intermediate": ("The signer's issuer is one of AMD's.", "policy: intermediates"),
    "snp-signing-key": ("Report, signer and issuer name the same kind of key.", "AMD 56860, SIGNING_KEY"),
    "snp-product": ("Report, signer, issuer and root are of one product.", "AMD 57230, productName; 56860, CPUID"),
    "snp-signer-tcb": ("The signer was issued for the firmware reported.", "AMD 57230, SPL; 56860, REPORTED_TCB"),
    "snp-chip": ("The signer was issued for the chip reported.", "AMD 57230, hwID; 56860, CHIP_ID"),
    "snp-signature": ("The signer signed the report.", "AMD 56860, SIGNATURE; FIPS 186-5, 6.4"),
}
"""The checks of who made the report."""

JUDGEMENT: dict[str, tuple[str, str]] = {
    "snp-report-data": ("The report was made for this question.", "AMD 56860, REPORT_DATA"),
    "snp-measurement": ("The machine runs an image that the policy names.", "policy: measurements"),
    "snp-debug": ("The host can't read the machine through its debugger.", "policy: debug"),
    "snp-migrate-ma": ("No migration agent can take the machine elsewhere.", "policy: migrate_ma"),
    "snp-smt": ("The guest's policy on simultaneous multithreading.", "policy: smt"),
    "snp-single-socket": ("The guest's policy on running on one socket.", "policy: single_socket"),
    "snp-cxl-allow": ("The guest's policy on CXL devices and memory.", "policy: cxl_allow"),
    "snp-mem-aes-256-xts": ("The guest's policy on AES-256-XTS for its memory.", "policy: mem_aes_256_xts"),
    "snp-rapl-dis": ("The guest's policy on measuring its power.", "policy: rapl_dis"),
    "snp-ciphertext-hiding": ("The guest's policy on hiding its ciphertext.", "policy: ciphertext_hiding_dram"),
    "snp-page-swap-disable": ("The guest's policy on swapping its pages.", "policy: page_swap_disable"),
    "snp-abi": ("The guest runs on no firmware older than demanded.", "policy: minimum_abi"),
    "snp-vmpl": ("The demanded privilege level of the guest asked for the report.", "policy: vmpl"),
    "snp-host-data": ("The host gave the machine what the policy names.", "policy: host_data"),
    "snp-id-key": ("A key that the policy names signed the ID block.", "policy: id_keys"),
    "snp-author-key": ("A key that the policy names certified the ID key.", "policy: author_keys"),
    "snp-family-id": ("The ID block's family is one that the policy names.", "policy: family_ids"),
    "snp-image-id": ("The ID block's image is one that the policy names.", "policy: image_ids"),
    "snp-guest-svn": ("The guest's security version is recent enough.", "policy: minimum_guest_svn"),
    "snp-tcb-order": ("The security versions don't contradict each other.", "AMD 56860, SNP_CONFIG, SNP_COMMIT"),
    "snp-minimum-tcb": ("The platform's firmware is recent enough.", "policy: minimum_tcb"),
    "snp-launch-tcb": ("The firmware that launched the machine is recent enough.", "policy: minimum_launch_tcb"),
    "snp-minimum-firmware": ("The firmware that is committed is recent enough.", "policy: minimum_firmware"),
    "snp-committed": ("The host can't go back to older firmware.", "policy: provisional_firmware"),
    "snp-mitigations": ("The demanded mitigations are in force.", "policy: mitigations"),
    "snp-platform-smt": ("The host's simultaneous multithreading.", "policy: platform_info.smt_en"),
    "snp-platform-tsme": ("The host's transparent memory encryption.", "policy: platform_info.tsme_en"),
    "snp-platform-ecc": ("The host's memory corrects errors.", "policy: platform_info.ecc_en"),
    "snp-platform-rapl": ("The host can't measure power.", "policy: platform_info.rapl_dis"),
    "snp-platform-ciphertext-hiding": (
        "The host can't read the ciphertext of memory.",
        "policy: platform_info.ciphertext_hiding_dram_en",
    ),
    "snp-platform-alias-check": (
        "Memory was checked for aliases since the last reset.",
        "policy: platform_info.alias_check_complete; AMD-SB-3015",
    ),
    "snp-platform-tio": ("The host's trusted devices.", "policy: platform_info.tio_en"),
    "snp-product-admitted": ("The processor is of an admitted product.", "policy: products_allowed, products_denied"),
    "snp-chip-admitted": ("The chip is admitted.", "policy: chips_allowed, chips_denied"),
    "snp-masked-chip": ("The report names its chip.", "policy: masked_chip_id"),
    "snp-vlek": ("The chip's own key signed, or an admitted provider's.", "policy: vlek"),
}
"""The checks of what the report says."""

SNP_CHECKS = AUTHENTICITY | JUDGEMENT
"""Every appraisal answers all of these, in this order: name, what the check establishes, where it comes from."""
