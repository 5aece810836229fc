"""What stays float: a solver."""

import jax.numpy as jnp
from jax import lax


def solved(x):
    """x of two or more dimensions, as the solution of identity @ y = x; the primitive is `triangular_solve`."""
    identity = jnp.broadcast_to(jnp.eye(x.shape[-2], dtype=x.dtype), (*x.shape[:-1], x.shape[-2]))
    return lax.linalg.triangular_solve(identity, x, left_side=True, lower=True)
