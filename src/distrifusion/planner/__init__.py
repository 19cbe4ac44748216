"""Which plan, how fast, how sure: what plans cost on devices that are here or are not, and which one is taken."""
