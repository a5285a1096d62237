"""Arithmetic of vectors at the places where a plain form has no gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from maskae.vectors import maximum_over


def test_a_maximum_gives_its_gradient_to_the_first_of_the_largest():
    x = jnp.asarray([[1.0, 3.0, 3.0], [-1.0, -2.0, -jnp.inf], [-jnp.inf] * 3])
    np.testing.assert_array_equal(maximum_over(x, 1), x.max(1))
    np.testing.assert_array_equal(maximum_over(x, -2), x.max(0))
    gradient = jax.grad(lambda x: (maximum_over(x, 1)[:2] * jnp.asarray([1.0, 2.0])).sum())(x)
    np.testing.assert_array_equal(gradient, [[0, 1, 0], [2, 0, 0], [0, 0, 0]])
