"""One run: load, check, train, score, certify; and what it leaves in its folder."""
