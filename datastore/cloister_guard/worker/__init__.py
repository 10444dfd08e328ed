"""One process for one job on private rows: confined before it sees any, silent but for its answer, killed after."""
