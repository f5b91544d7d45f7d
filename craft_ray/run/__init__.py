"""One run: load, check, train, score, certify; and what it writes into its folder."""
