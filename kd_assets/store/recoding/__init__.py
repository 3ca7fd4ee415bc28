"""A result made of another one that differs by its codec alone: `sources` finds what it can be made of, `recode` makes
it.

Numpy and pyarrow, no torch: the teacher is not asked. The invariant: what comes out has the name and the bytes that the
teacher's pass would have written with that codec, or is refused.
"""
