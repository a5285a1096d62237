"""Residual networks: torchvision's sizes, the sparse mode's promises, stochastic depth."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskae.errors import UserError
from maskae.nn.resnet import ResNet, Style, scaled
from maskae.nn.sparse_conv import visible_at

NET = ResNet(layers=(1, 1), channels=(2, 3), stem_channels=4)
IMAGES = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
VISIBLE = jnp.asarray([[[True, False], [False, True]], [[False, True], [True, False]]])
VARIABLES = jax.jit(lambda: NET.init(jax.random.key(1), IMAGES, train=False))()


@jax.jit
def run(images: jax.Array, visible: jax.Array | None = None) -> tuple[Any, Any]:
    return NET.apply(VARIABLES, images, train=True, visible=visible, collect=True, mutable=["batch_stats"])


@pytest.mark.parametrize(("name", "parameters", "giga_macs"), [("resnet18", 11_176_512, 1.814), ("resnet50", 23_508_032, 4.087)])
def test_sizes_are_those_of_torchvision(name: str, parameters: int, giga_macs: float) -> None:
    net = scaled(name)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == parameters
    assert net.flops((224, 224)) == pytest.approx(2e9 * giga_macs, rel=1e-3)


def test_with_everything_visible_the_sparse_network_is_the_dense_one() -> None:
    sparse, moved = run(IMAGES, jnp.ones_like(VISIBLE))
    dense, dense_moved = run(IMAGES)
    for a, b in zip(sparse.maps, dense.maps, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, dense_moved)
    assert [each.shape for each in dense.maps] == [(2, 8, 8, 8), (2, 4, 4, 12)]
    assert tuple(each.shape[-1] for each in dense.maps) == NET.widths and NET.reductions == (4, 8)


def test_hidden_cells_are_zero_everywhere_and_have_no_influence() -> None:
    sparse, _ = run(IMAGES, VISIBLE)
    for name, x in [*sparse.named.items(), *enumerate(sparse.maps)]:
        hidden = ~np.asarray(visible_at(VISIBLE, x.shape[1:3]))
        assert np.abs(np.asarray(x)[hidden]).max() == 0, name
        assert np.abs(np.asarray(x)[~hidden]).max() > 0, name
    hidden_pixels = ~visible_at(VISIBLE, (32, 32))[..., None]
    other, _ = run(jnp.where(hidden_pixels, 99.0, IMAGES), VISIBLE)
    jax.tree.map(np.testing.assert_array_equal, other.maps, sparse.maps)


def test_an_ordinary_convolution_leaks_into_hidden_cells() -> None:
    dense, _ = run(jnp.where(visible_at(VISIBLE, (32, 32))[..., None], IMAGES, 0))
    hidden = ~np.asarray(visible_at(VISIBLE, (8, 8)))
    assert np.abs(np.asarray(dense.maps[0])[hidden]).max() > 0.1


def test_rematerialisation_the_small_stem_and_basic_blocks() -> None:
    small = scaled("resnet18", 1 / 16, layers=(1, 1), stem="small", style=Style(zero_last=True))
    images = IMAGES[:, :8, :8]
    variables = jax.jit(lambda: small.init(jax.random.key(0), images, train=False))()
    assert float(variables["params"]["stage2_block0"]["norm2"]["scale"].max()) == 0

    @partial(jax.jit, static_argnums=0)
    def gradient(net: ResNet, params: Any) -> Any:
        def loss(p: Any) -> tuple[jax.Array, Any]:
            pyramid, _ = net.apply({**variables, "params": p}, images, train=True, mutable=["batch_stats"])
            return jnp.square(pyramid.pooled).sum(), pyramid.maps

        return jax.grad(loss, has_aux=True)(params)

    found, maps = gradient(small, variables["params"])
    again, _ = gradient(small.clone(remat=True), variables["params"])
    assert [each.shape[1] for each in maps] == [8, 4] and small.reductions == (1, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, again)


def test_unknown_words_are_named() -> None:
    with pytest.raises(UserError, match="unknown network 'resnet51' \\(did you mean 'resnet50'"):
        scaled("resnet51")
    with pytest.raises(UserError, match="unknown stem 'imagnet'"):
        ResNet(stem="imagnet").check()
    with pytest.raises(UserError, match="strides=.* has fewer values than layers"):
        ResNet(strides=(1, 2)).check()
