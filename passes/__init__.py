"""The passes, one a file: `Program -> Program`. Each opens with what it does to a tiny program.

Passes know `ir`, `numerics` and `ops`; they know no backend and no other pass (shared analyses are in `_`-files).
"""
