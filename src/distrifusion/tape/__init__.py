"""A call's operations on CPU, noted once and then done again without the model's Python: there, what a CUDA graph is.

Between two large kernels the processor forgets the interpreter and the model's objects, so that Python costs several
times what it does in a loop. A replay walks a flat list: an operation, where its arguments are, where its result goes.
"""

from distrifusion.tape.recording import Given, Tape, TapeBackend

__all__ = ["Given", "Tape", "TapeBackend"]
