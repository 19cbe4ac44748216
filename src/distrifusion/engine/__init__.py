"""Our own samplers inside diffusers' own pipelines: the pipeline's loop serves a sampler instead of its scheduler.

    words.py      what a call says of samplers, checked;  pipelines.py  what must be known of a pipeline's class
    run.py        one call of a pipeline whose loop serves a sampler
    rounds.py     the pipeline's timesteps, one for each denoiser call;  rows.py  a denoiser call with more rows

The pipeline encodes, guides, tells its callback and decodes by its own code. Its loop goes round once for each denoiser
call that the sampler asks for; the denoiser gets the sampler's rows, and the scheduler's step hands on the answers.
"""
