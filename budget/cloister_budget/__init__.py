"""Privacy loss, the budget filter, the owner's policy, the ledger of charges, and the audit log.

`orders`, `loss`, `filter`, `calibrate`, `quote`, `policy`, `merkle` and `checkpoint` are pure and load no database,
so that a laptop can recompute what a guard charged. `tables`, `database`, `ledger`, `views` and `log` need SQLAlchemy.
"""
