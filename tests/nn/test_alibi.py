"""Distance biases: the slopes of the papers, and that taking patches before or after the table gives the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.kernels.attention import attention
from maskae.nn.alibi import alibi_slopes, distance_bias, patch_coordinates


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (16, [2 ** (-i / 2) for i in range(1, 17)]),
        (8, [2.0**-i for i in range(1, 9)]),
        (12, [*(2.0**-i for i in range(1, 9)), 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
        (1, [2.0**-8]),
    ],
)
def test_slopes_of_the_papers(heads: int, expected: list[float]) -> None:
    np.testing.assert_allclose(alibi_slopes(heads), expected, rtol=1e-6)


def test_full_table_is_symmetric_and_largest_on_its_diagonal() -> None:
    places = jnp.asarray(patch_coordinates((15, 15)))[None]
    table = np.asarray(distance_bias(places, places, jnp.asarray(alibi_slopes(16))))[0]
    np.testing.assert_array_equal(np.diagonal(table, axis1=1, axis2=2), 0)
    np.testing.assert_array_equal(table, table.transpose(0, 2, 1))
    assert (table.argmax(-1) == np.arange(225)).all()
    assert table[0, 0, 224] == pytest.approx(-14.0, rel=1e-5)
    assert table[15, 0, 224] == pytest.approx(-0.07734, rel=1e-3)


def test_masked_bias_is_the_gathered_table_also_for_unequal_counts() -> None:
    generator = np.random.default_rng(0)
    places, slopes = patch_coordinates((4, 6)), jnp.asarray(alibi_slopes(4))
    table = np.asarray(distance_bias(jnp.asarray(places)[None], jnp.asarray(places)[None], slopes))[0]
    queries, keys = (np.stack([generator.permutation(24)[:n] for _ in range(3)]) for n in (5, 9))
    found = distance_bias(jnp.asarray(places)[queries], jnp.asarray(places)[keys], slopes)
    for row in range(3):
        np.testing.assert_array_equal(found[row], table[:, queries[row]][:, :, keys[row]])


def test_attention_that_forms_the_bias_is_attention_with_the_table() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (2, n, 4, 8)) for k, n in zip(keys, (5, 7, 7), strict=True))
    places, slopes = jnp.asarray(patch_coordinates((3, 4))), jnp.asarray(alibi_slopes(4))
    own = places[jnp.asarray([[0, 3, 5, 7, 9], [1, 2, 4, 8, 11]])]
    other = places[jnp.stack([jnp.arange(7), jnp.arange(5, 12)])]
    formed = attention(query, key, value, query_positions=own, key_positions=other, slopes=slopes, implementation="xla")
    plain = jax.nn.dot_product_attention(query, key, value, bias=distance_bias(own, other, slopes))
    np.testing.assert_allclose(formed, plain, atol=1e-5)
    assert float(jnp.abs(formed - jax.nn.dot_product_attention(query, key, value)).max()) > 1e-2
