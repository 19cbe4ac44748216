"""Samplers: each says which evaluations of the denoiser it needs, and somebody else decides when and where they run.

A sampler is a generator. It yields `Evaluations`, is sent the denoiser's answers, and returns a `Sample`:

    diffusers_loop.py  diffusers' own schedulers, one evaluation after the other
    window.py          a window of steps at once until it stands still: ParaDiGMS and ParaTAA (anderson.py, unrolled.py)
    tableau.py         a scheduler's steps as coefficients, which those need;  schedules.py reads them off diffusers

It knows no ranks, no model and no other sampler. Whatever it decides follows from what it is sent.
"""
