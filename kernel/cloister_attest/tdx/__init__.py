"""Intel TDX quotes: parse (`abi`), authenticate (`chain`, `collateral`, `verify`), judge (`validate`)."""
