"""Plans measured against a plain diffusers pipeline and against each other, in one run."""
