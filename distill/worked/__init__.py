"""Small solvers that write worked solutions: the cold-start data of tiny-r1 and the corpus of the student bases.

One module a reasoning-gym family, each with `solve(problem) -> Worked`: the lines a careful person would write,
every line one small step (digit by digit with carries), so that a model of a few million parameters can learn it.
`steps` holds the steps that the families share, `corpus` turns solutions into training text.
"""
