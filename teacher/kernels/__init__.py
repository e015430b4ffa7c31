"""Triton kernels, each in a file of its own beside the plain-torch definition that it is tested against.

On a GPU they are compiled; under TRITON_INTERPRET=1 (set before Triton is imported) the same code runs on a CPU, which
is how the tests prove it there. Nothing here is imported by the model unless it is asked for.
"""
