"""Topologies by name: sizes, links, and one clear line for those that do not exist."""

from __future__ import annotations

import numpy as np
import pytest

from maskae.errors import UserError
from maskae.planning.chips import CHIPS, parse_topology, shapes_of


@pytest.mark.parametrize(
    ("text", "size", "shape"),
    [
        ("v5e:16x16", 256, (16, 16)),
        ("v5p:4x4x4", 64, (4, 4, 4)),
        ("v6e:2x2", 4, (2, 2)),
        ("v4:2x2x1", 4, (2, 2, 1)),
        ("h100:64", 64, (64,)),
    ],
)
def test_a_topology_has_the_chips_of_its_shape(text, size, shape):
    topology = parse_topology(text)
    assert (topology.size, topology.shape) == (size, shape)
    assert topology.is_gpu == text.startswith("h")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5x:4x4", ("v5x", "did you mean 'v5")),
        ("v5litepod:4x4", ("did you mean 'v5e'",)),
        ("v5e:3x5", ("no such slice", "nearest: v5e:4x4")),
        ("v5e:16x32", ("nearest: v5e:16x16",)),
        ("v5p:16x16", ("no such slice", "v5p:")),
        ("v5e", ("such as v5e:4x4",)),
        ("v5e:axb", ("such as v5e:4x4",)),
        ("h100:12", ("whole nodes", "h100:16")),
        ("a100:8", ("a100", "there are v4")),
    ],
)
def test_what_does_not_exist_is_named_with_the_nearest(text, words):
    with pytest.raises(UserError) as error:
        parse_topology(text)
    assert "\n" not in str(error.value)
    for word in (text, *words):
        assert word in str(error.value)


def test_every_offered_shape_parses():
    for kind, chip in CHIPS.items():
        if chip.jax_name:
            for shape in shapes_of(kind):
                assert parse_topology(f"{kind}:{'x'.join(map(str, shape))}").shape == shape


def box(*extents: int, step: int = 1) -> list[tuple[int, ...]]:
    return [tuple(step * place for place in chip) for chip in np.ndindex(*extents)]


def test_a_closed_ring_has_two_links_and_a_line_one():
    pod, corner = parse_topology("v5e:16x16"), parse_topology("v5e:4x4")
    assert pod.usable_links(box(16, 16)) == 4
    assert pod.usable_links(box(16, 1)) == 2
    assert pod.usable_links(box(8, 1)) == 1
    assert corner.usable_links(box(4, 4)) == 2  # v5e closes rings only over 16 chips
    assert parse_topology("v5p:4x4x4").usable_links(box(4, 4, 4)) == 6
    assert parse_topology("v5p:2x2x1").usable_links(box(2, 2, 1)) == 2


def test_groups_that_lie_between_each_other_share_links():
    pod = parse_topology("v5e:16x16")
    assert pod.usable_links(box(8, 1, step=2)) == 1  # the whole ring, for two groups
    assert pod.usable_links(box(2, 8, step=2)) == 0.5 + 1
