"""Backends: each turns regions into integers its own way. They know `ir`, `numerics` and `ops`, and no pass."""
