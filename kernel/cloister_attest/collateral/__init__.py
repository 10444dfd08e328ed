"""What processor makers publish about their chips: kept on disk, fetched, handed over offline, chosen for an appraisal.

Nothing here is believed: each piece is judged where it is used, by `cloister_attest.snp` and `cloister_attest.tdx`.
"""
