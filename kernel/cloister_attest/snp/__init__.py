"""AMD SEV-SNP: `abi` parses reports, `verify` says who made them, `validate` judges what they say.

`appraise_snp` makes all the checks. Sources, by AMD's document numbers: 56860 (SEV-SNP Firmware ABI), 57230 (VCEK
certificate and KDS interface), 58369 (VLEK certificate), 56421 (Guest-Hypervisor Communication Block).
"""
