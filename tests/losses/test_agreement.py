"""Token agreement: its range, what the two pairings count, and gradients where a token is zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.losses.agreement import token_agreement

FIRST = jax.random.normal(jax.random.key(0), (3, 5, 8))
SECOND = jax.random.normal(jax.random.key(1), (3, 5, 8))
COUNTED = jnp.asarray([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


def test_equal_tokens_agree_with_themselves_but_not_with_all_others() -> None:
    assert token_agreement(FIRST, 3 * FIRST, COUNTED) == pytest.approx(0, abs=1e-6)
    assert token_agreement(FIRST, FIRST, COUNTED, "all") > 0.1
    assert token_agreement(FIRST, -FIRST, COUNTED) == pytest.approx(2, abs=1e-6)


def test_orthogonal_tokens_are_at_one() -> None:
    basis = jnp.eye(8)[None]
    assert token_agreement(basis[:, :4], basis[:, 4:], jnp.ones((1, 4))) == pytest.approx(1)


def test_pairings_are_equal_where_all_tokens_of_the_other_view_are() -> None:
    same = jnp.broadcast_to(SECOND[:, :1], SECOND.shape)
    np.testing.assert_allclose(token_agreement(FIRST, same, COUNTED), token_agreement(FIRST, same, COUNTED, "all"), rtol=1e-6)


def test_both_pairings_against_numpy() -> None:
    first, second = (np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True) for x in (FIRST, SECOND))
    apart = 1 - np.einsum("bid,bjd->bij", first, second)  # [B, N, N]
    chosen = np.asarray(COUNTED, bool)
    assert token_agreement(FIRST, SECOND, COUNTED) == pytest.approx(np.einsum("bii->bi", apart)[chosen].mean(), rel=1e-5)
    assert token_agreement(FIRST, SECOND, COUNTED, "all") == pytest.approx(apart.mean(-1)[chosen].mean(), rel=1e-5)


def test_zero_tokens_and_nothing_counted_give_finite_gradients() -> None:
    for counted in (COUNTED, jnp.zeros_like(COUNTED)):
        value, gradient = jax.value_and_grad(token_agreement)(FIRST.at[0, 0].set(0), SECOND, counted)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()
    assert value == 0


def test_unknown_pairings_and_shapes_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'matched'"):
        token_agreement(FIRST, SECOND, COUNTED, "match")
    with pytest.raises(UserError, match="want"):
        token_agreement(FIRST, SECOND[:, :4], COUNTED)
