"""What a plan keeps in memory between denoiser calls, what is free, and whether the one fits into the other."""
