"""Stage 'problems': what is asked, what may be trained on, and the proof that the two do not overlap."""

from distill.identity import held_out, problem_hash
from distill.procedural import reasoning_gym_problems

__all__ = ["held_out", "problem_hash", "reasoning_gym_problems"]
