"""Commands beside training: plan, parity, doctor, convert."""
