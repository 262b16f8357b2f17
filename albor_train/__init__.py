"""Train small Python models with fill-in-the-middle, each artefact from a committed spec."""
