"""How a denoiser's calls are divided within a team: one file for each way."""
