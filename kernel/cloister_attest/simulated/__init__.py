"""Simulated hardware: the same steps as for a real platform, over a throw-away root that nobody should trust.

`abi` parses a report, `verify` authenticates it, `validate` judges it; `hardware` is the machine itself.
"""

from cloister_attest.simulated.hardware import SimulatedHardware

__all__ = ["SimulatedHardware"]
