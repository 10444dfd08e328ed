"""Simulated hardware: the same steps as for a real platform, over a throw-away root that nobody should trust.

`abi` parses a report, `verify` authenticates it, `validate` judges it, `appraise` makes all the checks; `hardware` is
the machine itself.
"""
