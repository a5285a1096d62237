"""GM-DF: what the card says has to hold. There is no released code to compare with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from maskae.data.episodes import EpisodeOrder
from maskae.errors import UserError
from maskae.interop.clip_text import EMBEDDING, TEXT, read_text_tower
from maskae.interop.layout import Geometry, to_foreign
from maskae.interop.weights import export_weights
from maskae.losses.reconstruction import masked_mean_squared_error
from maskae.nn.domain_vit import Domain, carry
from maskae.nn.experts import Gate, SoftExperts
from maskae.nn.layers import Attention, LayerNorm
from maskae.nn.vit import ViTEncoder
from maskae.paths import flatten_paths, unflatten_paths
from maskae.start import start_from
from maskae.systems import SYSTEMS
from maskae.systems.contract import System, Variables
from maskae.systems.gm_df import GmDf, Seen
from tests.systems.test_mae import count

SMALL: dict[str, Any] = {"image_size": 8, "patch_size": 2, "width": 8, "depth": 2, "heads": 2, "second_order": (0,), "domains": 3}
SMALL |= {"train_domains": 2, "code_width": 4, "expert_width": 4, "embedding_width": 6, "text": "prototypes", "text_width": 6}
SMALL |= {"text_depth": 1, "text_heads": 2, "text_length": 10, "decoder_width": 8, "decoder_depth": 1, "decoder_heads": 2}
GM_DF = GmDf(**SMALL, inner_rate=0.5)
B = 12
INDEX = jnp.arange(B, dtype=jnp.int32)
BATCH = {"image": jax.random.normal(jax.random.key(1), (B, 8, 8, 3)), "label": INDEX // 3 % 2, "domain": INDEX % 3, "example": INDEX}
BATCH["seen"] = jnp.ones(B, jnp.int32)
STARTED = jax.jit(GM_DF.init)(jax.random.key(0), BATCH)
# Away from the start, where maps and experts are 0.
PARAMS = jax.tree.map(lambda x: x + 0.3 * np.random.default_rng(x.size).standard_normal(x.shape, np.float32), STARTED.params)
META = dataclasses.replace(GM_DF, depth=1, second_order=(), reconstruction_weight=0.0)  # compiles in a quarter of the time
loss_and_gradient = jax.jit(jax.value_and_grad(lambda p: META.loss(p, STARTED.state, BATCH, jax.random.key(2), jnp.int32(0)), has_aux=True))


def plain(encoder: dict[str, Any]) -> dict[str, Any]:
    """A tower's parameters without what a contrastive model's tower has not."""
    return unflatten_paths({p: x for p, x in flatten_paths(encoder).items() if "/experts/" not in p and not p.endswith("_map")})


def test_is_a_registered_system() -> None:
    assert SYSTEMS["gm_df"] is GmDf
    assert isinstance(GM_DF, System)
    assert GM_DF.couples_examples


def test_sizes_and_flops_of_the_paper() -> None:
    paper = GmDf()
    variables = jax.eval_shape(paper.init, jax.random.key(0), {})
    tower = jax.eval_shape(
        ViTEncoder(16, 768, 12, 12, (14, 14), trainable_position=True, pre_norm=True).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
    )["params"]
    assert count(plain(variables.params["encoder"])) == count(tower)
    bottlenecks = 12 * 3 * (2 * 768 * 192 + 768 + 192)
    gates = 12 * (512 * 64 + 64 + 64 * 3 + 3)
    assert count(variables.params["encoder"]) == count(tower) + bottlenecks + gates + 12 * 2 * 2 * 64 * 768
    assert count(variables.params["prompt"]) == (6 + 2) * 512
    # 12 blocks of width 512, positions of 77 tokens, the final norm, the projection and 8 words: CLIP's 63.4 M without its vocabulary.
    assert count(variables.state["text"]) == 12 * (12 * 512**2 + 13 * 512) + 77 * 512 + 2 * 512 + 512**2 + 8 * 512
    batch: Any = {"image": jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)}
    # The card: 17.6 GMAC of the tower (17.5 with attention) and 2.1 of the experts, twice, and 1.5 of the decoder.
    assert paper.forward_flops(batch) == pytest.approx(2e9 * (2 * (17.56 + 2.09) + 1.66), rel=1e-2)
    assert paper.kept(196) == 98
    assert 1.9 < paper.train_flops(batch) / (3 * paper.forward_flops(batch)) + 1 < 3


def test_at_the_start_the_tower_is_the_contrastive_one_for_every_domain() -> None:
    tower = ViTEncoder(2, 8, 2, 2, (4, 4), trainable_position=True, pre_norm=True, activation="quick_gelu", epsilon=1e-5)
    expected: Any = jax.jit(tower.apply)({"params": plain(STARTED.params["encoder"])}, BATCH["image"][:4])
    see = jax.jit(lambda p, rows: GM_DF.see(p, BATCH["image"][:4], rows).tokens)
    rows = jnp.arange(4)  # the unknown domain and all others
    np.testing.assert_allclose(see(STARTED.params, rows), expected, atol=1e-5)
    moved = see(PARAMS, rows)
    assert float(jnp.abs(moved - see(PARAMS, jnp.zeros(4, jnp.int32))).max()) > 0.01


def test_gates_depend_on_the_domain_alone() -> None:
    gate = PARAMS["encoder"]["block_0"]["experts"]["gate"]
    table = PARAMS["prompt"]["domain"]
    weights: Any = Gate(3, 64).apply({"params": gate}, 5 * table)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    assert float(jnp.abs(weights - weights[0]).max()) > 1e-3
    experts = {**PARAMS["encoder"]["block_0"]["experts"], "fc2": {"kernel": jnp.zeros((3, 4, 8)), "bias": jnp.eye(3, 8)}}
    # Experts that give a constant each show their weights at every token.
    given: Any = SoftExperts(3, 4).apply({"params": experts}, jax.random.normal(jax.random.key(3), (4, 5, 8)), 5 * table)
    np.testing.assert_allclose(given[:, :, :3], jnp.broadcast_to(weights[:, None], (4, 5, 3)), rtol=1e-5)


def test_experts_that_look_at_each_other_weigh_by_their_outputs() -> None:
    experts = SoftExperts(2, 4, "attention")
    x = jax.random.normal(jax.random.key(4), (2, 3, 8))
    params: Any = experts.init(jax.random.key(5), x, jnp.zeros((2, 6)))["params"]
    assert "gate" not in params
    outputs = np.array([[4.0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]])
    params = {**params, "fc2": {"kernel": jnp.zeros((2, 4, 8)), "bias": jnp.asarray(outputs)}}
    scores = np.exp(outputs @ outputs.T / math.sqrt(8))
    weights = (scores / scores.sum(1, keepdims=True)).mean(0)
    given: Any = experts.apply({"params": params}, x, jnp.zeros((2, 6)))
    np.testing.assert_allclose(given[0, 0], weights @ outputs, rtol=1e-5)


def test_one_domain_needs_no_episode() -> None:
    one = GmDf(**{**SMALL, "domains": 1, "train_domains": 1, "test_domains": 0, "reconstruction_weight": 0.0})
    assert not one.adapts
    variables = jax.eval_shape(one.init, jax.random.key(0), BATCH)
    batch = {**BATCH, "domain": jnp.zeros(B, jnp.int32)}
    loss, outputs = jax.eval_shape(one.loss, *variables, batch, jax.random.key(0), 0)
    assert loss.shape == ()
    assert set(outputs.metrics) == {"classification_loss", "gradient_norm_inner", "accuracy"}


@pytest.mark.parametrize("classification", ["prompt", "bce"])
def test_equal_similarities_cost_ln_2(classification: str) -> None:
    system = dataclasses.replace(GM_DF, classification=classification)
    prompt = {**PARAMS["prompt"], "prototypes": jnp.broadcast_to(PARAMS["prompt"]["prototypes"][:, :1], (4, 2, 6))}
    params = {**PARAMS, "prompt": prompt, "head": {"kernel": jnp.zeros((8, 1)), "bias": jnp.zeros(1)}}
    seen = Seen(jnp.zeros((4, 17, 8)), jax.random.normal(jax.random.key(6), (4, 8)))
    logits = system.logits(params, {}, seen, jnp.arange(4))
    np.testing.assert_allclose(-jax.nn.log_softmax(logits)[:, 0], math.log(2), rtol=1e-5)


def test_the_temperature_grows_with_the_domain_embedding() -> None:
    seen = Seen(jnp.zeros((4, 17, 8)), jnp.ones((4, 8)))
    prototypes = jnp.broadcast_to(PARAMS["prompt"]["prototypes"][:1], (4, 2, 6))
    params = {**PARAMS, "prompt": {**PARAMS["prompt"], "domain": 3.0 * jnp.eye(4, 6), "prototypes": prototypes}}
    params["prompt"]["domain"] = params["prompt"]["domain"].at[0].set(0.0)
    logits = GM_DF.logits(params, {}, seen, jnp.arange(4))
    np.testing.assert_allclose(logits[1] / logits[0], 0.07 / (0.07 + 0.01 * 3), rtol=1e-5)


def test_the_second_order_sum_over_heads_is_the_attention_of_the_class_token() -> None:
    block = PARAMS["encoder"]["block_1"]
    normalise: Any = LayerNorm().apply
    x = normalise({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, jax.random.normal(jax.random.key(7), (2, 5, 8)))
    attend: Any = Attention(2).apply
    whole = attend({"params": block["attention"]}, x)[:, 0]
    qkv, out = block["attention"]["qkv"], block["attention"]["out"]
    query, key = (jnp.einsum("bnd,dhk->bhnk", x, qkv["kernel"][:, i]) + qkv["bias"][i][:, None] for i in (0, 1))
    weights = jax.nn.softmax(jnp.einsum("bhnk,bhmk->bhnm", query, key)[:, :, 0] / 2, -1)  # head_dim 4
    # The biases are of values, whose weights sum to 1, and of the output.
    biases = jnp.einsum("hk,hkd->d", qkv["bias"][2], out["kernel"]) + out["bias"]
    np.testing.assert_allclose(carry(weights, x, block["attention"]) + biases, whole, atol=1e-5)
    twice = carry(weights, 2 * x, block["attention"])
    np.testing.assert_allclose(twice, 2 * carry(weights, x, block["attention"]), rtol=1e-4)


def test_the_tail_has_what_each_mlp_added_and_where_the_class_token_looks() -> None:
    domain = Domain(jnp.zeros((2, 4)), jnp.zeros((2, 6)))
    encode: Any = GM_DF.encoder.apply
    variables = {"params": PARAMS["encoder"]}
    tokens, tail = encode(variables, BATCH["image"][:2], domain, 0, method="represent")
    scanned, nothing = encode(variables, BATCH["image"][:2], domain, 2, method="represent")
    np.testing.assert_allclose(tokens, scanned, atol=1e-5)
    assert sorted(tail.branches) == sorted(tail.weights) == [0, 1]
    assert not nothing.branches
    np.testing.assert_allclose(tail.weights[1].sum(-1), 1.0, rtol=1e-5)
    assert tail.branches[0].shape == (2, 17, 8)


def test_the_tower_does_not_see_masked_patches_and_visible_ones_cost_nothing() -> None:
    noise = jax.random.uniform(jax.random.key(8), (2, 16))
    mask = GM_DF.mask(noise).mask
    assert mask.sum(1).tolist() == [8, 8]
    images, rows = BATCH["image"][:2], jnp.zeros(2, jnp.int32)
    inside = jnp.kron(mask.reshape(2, 4, 4, 1), jnp.ones((1, 2, 2, 1)))
    predict = jax.jit(lambda x: GM_DF.predict(PARAMS, x, rows, mask))
    prediction = predict(images)
    np.testing.assert_array_equal(prediction, predict(images + inside))
    assert float(jnp.abs(prediction - predict(images + (1 - inside))).max()) > 1e-3
    slopes = jax.grad(lambda p: masked_mean_squared_error(p, jnp.zeros_like(p), mask))(prediction)
    np.testing.assert_array_equal(jnp.abs(slopes).max(-1) > 0, mask > 0)


def test_the_loss_is_the_sum_of_its_parts_and_its_gradient_that_of_differences() -> None:
    (loss, outputs), gradient = loss_and_gradient(PARAMS)
    found = {name: float(value) for name, value in outputs.metrics.items()}
    parts = found["classification_loss"] + found["meta_test_loss"] + 0.3 * found["alignment_loss"]
    assert float(loss) == pytest.approx(parts, rel=1e-5)
    assert found["gradient_norm_inner"] > 1e-3
    start, draws = jax.device_get(PARAMS), np.random.default_rng(0)
    way = jax.tree.map(lambda x: draws.normal(size=x.shape).astype(np.float32), start)
    step = 2e-3
    up, down = (loss_and_gradient(jax.tree.map(lambda x, d, s=sign: x + s * step * d, start, way))[0][0] for sign in (1, -1))
    leaves = zip(jax.tree.leaves(jax.device_get(gradient)), jax.tree.leaves(way), strict=True)
    predicted = sum(float((g * d).sum()) for g, d in leaves)
    assert float(up - down) / (2 * step) == pytest.approx(predicted, rel=2e-2)


def test_parts_of_a_batch_are_its_groups_and_the_meta_test_domain_is_unknown() -> None:
    system = dataclasses.replace(GM_DF, hide_domain=0.0)
    train, test = system.parts(BATCH, jax.random.key(0))
    assert test is not None
    assert train.rows.tolist() == [1, 2] * 4
    assert test.rows.tolist() == [0] * 4
    np.testing.assert_array_equal(test.images, BATCH["image"][2::3])
    np.testing.assert_array_equal(train.labels, BATCH["label"].reshape(4, 3)[:, :2].ravel())
    shown = dataclasses.replace(system, hide_meta_test=False).parts(BATCH, jax.random.key(0))[1]
    assert shown is not None and shown.rows.tolist() == [3] * 4
    hidden, _ = dataclasses.replace(GM_DF, hide_domain=1.0).parts(BATCH, jax.random.key(0))
    assert hidden.rows.tolist() == [0] * 8
    assert GM_DF.rows({**BATCH, "seen": INDEX % 3 > 0}).tolist() == [0, 2, 3] * 4
    assert dataclasses.replace(GM_DF, domain_conditioning=False).rows(BATCH).tolist() == [0] * B
    with pytest.raises(UserError, match="fields domain and seen"):
        GM_DF.parts({name: BATCH[name] for name in ("image", "label", "example")}, jax.random.key(0))


def test_prompts_of_a_frozen_text_tower_reach_their_words_alone(tmp_path: Path) -> None:
    system = dataclasses.replace(GM_DF, text="tower")

    @jax.jit
    def start(key: jax.Array) -> Any:
        params, state = system.init(key, BATCH)
        return params["prompt"], state["text"]

    prompt, text = start(jax.random.key(0))
    assert set(prompt) == {"domain", "class"}

    def total(params: Any, state: Any) -> jax.Array:
        prompts = system.class_prompts(params, state)
        assert prompts.shape == (4, 2, 6)
        return jnp.square(prompts - 1).sum()

    # What CLIP's file would hold comes back from one.
    tower = {name: value for name, value in text.items() if name != "words"}
    kernel = np.ones((8, 6), np.float32)
    arrays = {name: np.asarray(x) for name, x in flatten_paths(tower).items()} | {"image_projection/kernel": kernel}
    tensors, unnamed = to_foreign(arrays, TEXT, Geometry(1, (1, 1)))
    assert not unnamed
    table = np.arange(49408 * 6, dtype=np.float32).reshape(-1, 6)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()} | {EMBEDDING: table}, tmp_path / "clip.safetensors")
    read, projection = read_text_tower(tmp_path / "clip.safetensors", text, jnp.zeros((8, 6)), system.words)
    for path, leaf in flatten_paths(tower).items():
        np.testing.assert_array_equal(flatten_paths(read)[path], leaf)
    np.testing.assert_array_equal(read["words"], table[list(system.words)])
    np.testing.assert_array_equal(projection, kernel)
    with pytest.raises(UserError, match="no text tower of these sizes"):
        read_text_tower(tmp_path / "clip.safetensors", text, jnp.zeros((9, 6)), system.words)

    by_params, by_text = jax.jit(jax.grad(total, argnums=(0, 1)))({"prompt": prompt}, {"text": text})
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(by_params))
    assert all(float(jnp.abs(x).max()) == 0 for x in jax.tree.leaves(by_text))


def test_a_frozen_tower_lies_in_the_state_and_a_pretrained_one_is_adopted() -> None:
    frozen = dataclasses.replace(GM_DF, train_vision=False)
    params, state = frozen.parted(STARTED)
    trained, kept = flatten_paths(params["encoder"]), flatten_paths(state["encoder"])
    assert all("norm" in path or "experts" in path for path in trained)
    assert not any("norm1" in path or "experts" in path for path in kept)
    assert frozen.parted(STARTED) is not STARTED is GM_DF.parted(STARTED)
    whole = flatten_paths(frozen.whole(params, state)["encoder"])
    assert {path: leaf.shape for path, leaf in whole.items()} == {p: x.shape for p, x in flatten_paths(STARTED.params["encoder"]).items()}
    given = plain(jax.tree.map(lambda x: x + 1, STARTED.params["encoder"]))
    for system, start in ((GM_DF, STARTED), (frozen, Variables(params, state))):
        adopted = flatten_paths(system.whole(*system.with_encoder(start, given, (4, 4)))["encoder"])
        for path, leaf in flatten_paths(given).items():
            np.testing.assert_array_equal(adopted[path], leaf)
        np.testing.assert_array_equal(adopted["block_0/norm1/scale_map"], 0)


@pytest.mark.parametrize("train_vision", [True, False])
def test_a_run_starts_from_a_file_of_clip(train_vision: bool, tmp_path: Path) -> None:
    system = dataclasses.replace(GM_DF, train_vision=train_vision)
    given = plain(jax.tree.map(lambda x: x + 1, STARTED.params["encoder"]))
    assert export_weights({"encoder": given}, tmp_path / "clip.safetensors", Geometry(2, (4, 4)), "clip") == ["encoder/patch_embed/bias"]
    started = start_from(system, system.parted(STARTED), tmp_path / "clip.safetensors")
    adopted = flatten_paths(system.whole(*started)["encoder"])
    for path, leaf in flatten_paths(given).items():
        np.testing.assert_array_equal(adopted[path], leaf if path != "patch_embed/bias" else 0)


def test_it_begins_with_the_runs_of_its_data_and_orders_episodes() -> None:
    runs = [[[0, 4], [4, 4]], [[8, 4], [12, 4]], [[16, 4], [20, 4]]]

    class Stage:
        spec = SimpleNamespace(details={"runs": runs}, name="forgeries:here")

        def __len__(self) -> int:
            return 24

    variables = GM_DF.begin(STARTED, Stage())
    order = GM_DF.order(variables, 12, 0)
    assert isinstance(order, EpisodeOrder)
    assert sorted(order[j] // 4 for j in range(12)) == sorted(list(range(6)) * 2)
    Stage.spec.details = {}
    with pytest.raises(UserError, match="domains=3: forgeries:here has no domains"):
        GM_DF.begin(STARTED, Stage())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate": "figur"}, "gate 'figur'.*'figure'"),
        ({"second_order": (1,)}, "layer 1 has none after it; there are layers 0 to 0"),
        ({"experts": 0}, "moves the experts, and there are none"),
        ({"train_domains": 3}, "together at most domains=3"),
        ({"attention": "pallas_gpu"}, "no second derivative"),
        ({"mask_ratio": 1.0}, "masks all or none of 16 patches"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GmDf(**{**SMALL, **changed})
