"""The product over non-zeros is the product of the corrupted features, with its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from maskae.nn.node_masks import corrupt, draw_node_mask
from maskae.nn.sparse_nodes import MaskedWords, word_fields, words_of


def test_product_and_gradients_are_those_of_the_dense_product():
    generator = np.random.default_rng(0)
    features = (generator.random((30, 17)) * (generator.random((30, 17)) < 0.08)).astype(np.float32)
    features[4] = 0
    fields = {name: jnp.asarray(value)[None] for name, value in word_fields(features).items()}
    words = words_of(fields | {"node_mask": jnp.ones((1, 30), bool)})
    x = jnp.asarray(features)
    mask = draw_node_mask(jax.random.uniform(jax.random.key(0), (30, 3)), jnp.arange(30) < 25, 0.5, 0.3)  # with padding and noise
    token, kernel, weights = (jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in ((1, 17), (17, 5), (30, 5)))
    assert words is not None

    def sparse(token, kernel):
        return (MaskedWords(x, mask, token, words).product(kernel, lambda part, key: part, None) * weights).sum()

    def dense(token, kernel):
        return ((corrupt(x, mask, token) @ kernel) * weights).sum()

    found, expected = (jax.jit(jax.value_and_grad(loss, (0, 1)))(token, kernel) for loss in (sparse, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert float(jnp.abs(found[1][0]).max()) > 0.1


def test_dense_features_have_no_fields():
    assert word_fields(np.ones((4, 3), np.float32)) == {}
