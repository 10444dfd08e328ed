"""The devices of a confidential VM that make evidence: `tsm` and `sev_guest` ask them, `hardware` checks the answers.

Sources: Linux, Documentation/ABI/testing/configfs-tsm and include/uapi/linux/sev-guest.h; AMD 56860 and 56421.
"""
