"""The contrastive half of the CT study's reference cases: MoCo, BYOL, SwAV, NT-Xent, their optimizers and schedules, and the CT slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.slices import hounsfield_units, stretch
from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Case, Reproduced, exact
from maskae.interop.cnn import batch_norm, foreign_names, load, resnet
from maskae.interop.layout import LINEAR, Layout, Rule
from maskae.interop.record import numbers_of
from maskae.interop.vit import linear
from maskae.losses.contrastive import nt_xent
from maskae.losses.sinkhorn import sinkhorn
from maskae.nn.batch_norm import STATISTICS, BatchNorm
from maskae.nn.heads import cosine_momentum
from maskae.optim import Optimizer, clip_by_global_norm, make_optimizer
from maskae.schedules import (
    cosine_between,
    warmup_constant,
    warmup_cosine,
    warmup_cosine_inclusive,
    warmup_cosine_periodic,
    warmup_linear,
)
from maskae.systems.byol import Byol
from maskae.systems.contract import Params, State
from maskae.systems.moco_v2 import MocoV2
from maskae.systems.swav import Swav
from maskae.vectors import unit


class LinearEncoder:
    """The recorded stand-in for the backbone of MoCo and BYOL: a linear map of the flattened image, batch norm, ReLU."""

    def represent(self, params: Params, statistics: State, images: jax.Array) -> tuple[jax.Array, State]:
        """[B, H, W, C] -> [B, outputs]; the recorded weights are for values in (channel, row, column) order."""
        flat = images.transpose(0, 3, 1, 2).reshape(images.shape[0], -1)
        x = flat @ params["lin"]["kernel"] + params["lin"]["bias"]
        apply: Any = BatchNorm().apply
        y, moved = apply({"params": params["bn"], STATISTICS: statistics["bn"]}, x, train=True, mutable=[STATISTICS])
        return jax.nn.relu(y), {"bn": moved[STATISTICS]}


class ToyMoco(LinearEncoder, MocoV2):
    """MoCo on the stand-in."""


class ToyByol(LinearEncoder, Byol):
    """BYOL on the stand-in."""


def images_of(case: Case, name: str) -> jax.Array:
    """Recorded images [B, C, H, W] as [B, H, W, C]."""
    return jnp.asarray(case.inputs[name], float).transpose(0, 2, 3, 1)


def encoder_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The stand-in's names."""
    return (*linear(f"{ours}/lin", f"{theirs}lin"), *batch_norm(f"{ours}/bn", f"{theirs}bn"))


def encoder_template(case: Case, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the stand-in's parameters and statistics."""
    outputs, inputs = case.weights[f"{name}lin.weight"].shape
    vector = jax.ShapeDtypeStruct((outputs,), jnp.float32)
    kernel = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
    params = {"lin": {"kernel": kernel, "bias": vector}, "bn": {"scale": vector, "bias": vector}}
    return params, {"bn": {"mean": vector, "variance": vector}}


def with_norms(grads: Any, layout: Layout) -> dict[str, Reproduced]:
    """`grad/<name>` and `gradnorm/<name>` of every parameter; gradients in float64."""
    found = {}
    for name, value in foreign_names(grads, layout).items():
        norm = np.linalg.norm(value.astype(np.float64).ravel())
        # A bias whose outputs are batch-normalised has the gradient 0; what is recorded is rounding.
        absolute, note = (1e-12, "its true gradient is 0: a batch norm follows") if norm < 1e-12 else (0.0, "")
        found[f"grad/{name}"] = Reproduced(value, GRADIENT, absolute, note=note)
        found[f"gradnorm/{name}"] = Reproduced(norm, GRADIENT, absolute, note=note)
    return found


def replay_moco(case: Case) -> dict[str, Reproduced]:
    """One batch: the moved key encoder, both embeddings, logits, loss, gradients, and the queue after it."""
    options = case.record["config"]["moco"]
    system = ToyMoco(
        queue=options["num_negatives"],
        outputs=options["emb_dim"],
        momentum=options["encoder_momentum"],
        temperature=options["softmax_temperature"],
        mlp_head=options["use_mlp"],
        dtype="float64",
        hidden=case.weights["moco.encoder_q.lin.weight"].shape[0],
    )
    head = (*linear("projector/fc1", "{who}fc.0"), *linear("projector/fc2", "{who}fc.2" if options["use_mlp"] else "{who}fc"))

    def layout(who: str) -> Layout:
        named = [rule._replace(theirs=tuple(name.replace("{who}", who) for name in rule.theirs)) for rule in head]
        return Layout((*encoder_rules("encoder", who), *named))

    parts: dict[str, tuple[Any, Any]] = {}
    for part in ("q", "k"):
        who = f"moco.encoder_{part}."
        encoder, statistics = encoder_template(case, who)
        projector = jax.eval_shape(lambda: system.head.start(jax.random.key(0), system.hidden or 0))[0]
        trees = ({"encoder": encoder, "projector": projector}, {"encoder": statistics})
        made = [load(case.weights, tree, layout(who), "moco") for tree in trees]
        parts[part] = (made[0], made[1]["encoder"])
    state = {"encoder": parts["q"][1], "key": {"params": parts["k"][0], "encoder": parts["k"][1]}}
    state["queue"] = jnp.asarray(case.weights["moco.queue"], float).T
    state["pointer"] = jnp.asarray(case.weights["moco.queue_ptr"][0], jnp.int32)
    images = [images_of(case, f"moco/img_{part}") for part in ("q", "k")]

    def run(params: Params) -> tuple[jax.Array, Any]:
        compared = system.compare(params, state, *images)
        return compared.loss, compared

    (_, compared), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(parts["q"][0])
    found = {"q": compared.queries, "k": compared.keys, "logits": compared.logits, "loss": compared.loss}
    found |= {"queue_after": compared.state["queue"].T}
    moved = foreign_names(compared.state["key"]["params"], layout(""))
    found |= {f"key_after_momentum/{name}": value for name, value in moved.items()}
    replayed = {f"moco/{name}": Reproduced(value) for name, value in found.items()}
    replayed["moco/queue_ptr_after"] = exact(np.asarray(compared.state["pointer"])[None])
    return replayed | with_norms(grads, layout("moco.encoder_q."))


def byol_layout(who: str, prefix: str = "byol.") -> Layout:
    """Names of the online or the target network."""
    base = f"{prefix}{who}." if who else prefix
    rules = list(encoder_rules("encoder", f"{base}encoder."))
    for part in ("projector", "predictor"):
        rules += [Rule(f"{part}/fc1/kernel", (f"{base}{part}.model.0.weight",), LINEAR), *linear(f"{part}/fc2", f"{base}{part}.model.3")]
        rules += batch_norm(f"{part}/norm", f"{base}{part}.model.1")
    return Layout(tuple(rules))


def byol_momentum(case: Case) -> tuple[int, float]:
    """Steps of the run and the target's momentum at its start, from what is said of the outputs that depend on them."""
    if "byol/tau_by_global_step" in case.outputs:
        steps, momentum = numbers_of(case.meaning("byol/tau_by_global_step"), r"max_steps (\d+), initial_tau (\d*\.?\d+)")
        return int(steps), momentum
    averaged = [name for name in case.meanings if name.startswith("byol/target_after_ema/")]
    # The whole run has no influence on its first step.
    return 1, numbers_of(case.meaning(averaged[0]), r"tau (\d*\.?\d+)")[0] if averaged else Byol.momentum


def replay_byol(case: Case) -> dict[str, Reproduced]:
    """Both directions of the loss, gradients, the target after one average, and its momentum over a run."""
    options = case.record["config"]["byol"]
    steps, momentum = byol_momentum(case)
    sizes = {"hidden": options["projector_hidden_size"], "outputs": options["projector_out_dim"]}
    system = ToyByol(**sizes, dtype="float64", momentum=momentum, total_steps=steps)
    loaded = {}
    for who in ("online_network", "target_network"):
        params, statistics = encoder_template(case, f"byol.{who}.encoder.")
        trees: tuple[dict[str, Any], dict[str, Any]] = ({"encoder": params}, {"encoder": statistics})
        for part, inputs in (("projector", options["encoder_out_dim"]), ("predictor", system.outputs)):
            made = jax.eval_shape(lambda inputs=inputs: system.head.start(jax.random.key(0), inputs))
            trees[0][part], trees[1][part] = made
        loaded[who] = [load(case.weights, tree, byol_layout(who), "byol") for tree in trees]
    params, state = loaded["online_network"]
    target = {name: loaded["target_network"][0][name] for name in ("encoder", "projector")}
    state["target"] = {"params": target, **{name: loaded["target_network"][1][name] for name in ("encoder", "projector")}}
    first, second = (images_of(case, f"byol/img_{i}") for i in (1, 2))

    def run(params: Params) -> tuple[jax.Array, Any]:
        compared = system.compare(params, state, first, second, target)
        return compared.first + compared.second, compared

    (loss, compared), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    averaged = foreign_names(system.target_params(params, state, jnp.asarray(1)), byol_layout("", ""))
    found = {"loss_a": compared.first, "loss_b": compared.second, "loss": loss}
    if "byol/tau_by_global_step" in case.outputs:
        found["tau_by_global_step"] = cosine_momentum(jnp.arange(len(case.outputs["byol/tau_by_global_step"])), momentum, steps)
    found |= {f"target_after_ema/{name}": value for name, value in averaged.items()}
    replayed = {f"byol/{name}": Reproduced(value) for name, value in found.items()}
    return replayed | with_norms(grads, byol_layout("online_network"))


def swav_of(case: Case) -> Swav:
    """The system with the recorded options."""
    options = case.record["config"]["swav"]
    weights = case.weights
    if "swav.prototypes.weight" not in weights:
        raise UserError(f"{case.folder}: nmb_prototypes={options['nmb_prototypes']} cannot be replayed: it is not one matrix of prototypes")
    stages = range(1, len(options["layers"]) + 1)
    width = tuple(weights[f"swav.layer{i}.0.conv1.weight"].shape[0] for i in stages)
    # The released network scales inner widths by width_per_group / 64 once more, the outer ones not.
    outer = tuple(weights[f"swav.layer{i}.0.conv3.weight"].shape[0] for i in stages)
    return Swav(
        image_size=options["sizes"][0],
        layers=tuple(options["layers"]),
        widths=width,
        outer_widths=outer,
        stem_width=weights["swav.conv1.weight"].shape[0],
        hidden=options["hidden_mlp"],
        outputs=options["output_dim"],
        prototypes=options["nmb_prototypes"],
        temperature=options["temperature"],
        epsilon=options["epsilon"],
        iterations=options["sinkhorn_iterations"],
        small_size=options["sizes"][-1],
        small_crops=sum(options["nmb_crops"][1:]),
        freeze_prototypes=0,
        dtype="float64",
    )


def swav_layout(hidden: int) -> Layout:
    """Names of the network whose head has so many channels inside; 0 is a linear head."""
    head = "swav.projection_head"
    rules = [*resnet("encoder/", "swav."), *linear("projector/fc1", f"{head}.0"), *batch_norm("projector/norm", f"{head}.1")]
    rules += [*linear("projector/fc2", f"{head}.3" if hidden else head), Rule("prototypes/kernel", ("swav.prototypes.weight",), LINEAR)]
    return Layout(tuple(rules))


def replay_swav(case: Case) -> dict[str, Reproduced]:
    """Embeddings, scores, codes, loss and gradients of all crops, and the codes with a queue before the batch."""
    system = swav_of(case)
    layout = swav_layout(system.hidden)
    template = jax.eval_shape(system.init, jax.random.key(0), {})
    params, state = (load(case.weights, tree, layout, "swav") for tree in template)
    crops = [images_of(case, f"swav/crop{i}") for i in range(sum(case.record["config"]["swav"]["nmb_crops"]))]

    def run(params: Params) -> tuple[jax.Array, Any]:
        clustered = system.cluster(params, state, crops, jnp.asarray(0))
        return clustered.loss, clustered

    (_, clustered), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    kernel = params["prototypes"]["kernel"]
    unit_kernel = kernel / jnp.linalg.norm(kernel, axis=0)
    found = {"embedding": clustered.embeddings, "scores": clustered.scores, "loss": clustered.loss, "prototypes_normalised": unit_kernel.T}
    found |= {f"codes_crop{i}": code for i, code in enumerate(clustered.codes)}
    if "swav/queue_embeddings" in case.inputs:
        batch = len(clustered.codes[0])
        queued = jnp.asarray(case.inputs["swav/queue_embeddings"], float) @ unit_kernel
        scores = jnp.concatenate([queued, clustered.scores[:batch]])
        found["codes_crop0_with_queue"] = sinkhorn(scores, system.epsilon, system.iterations)[-batch:]
    return {f"swav/{name}": Reproduced(value) for name, value in found.items()} | with_norms(grads, layout)


def replay_simclr(case: Case) -> dict[str, Reproduced]:
    """NT-Xent of recorded projections and its gradients with respect to them, through their normalisation."""
    outs = [jnp.asarray(case.inputs[f"simclr/out_{i}"], float) for i in (1, 2)]
    scale = 1 / case.record["config"]["simclr"]["tau"]
    loss, grads = jax.value_and_grad(lambda pair: nt_xent(unit(pair[0]), unit(pair[1]), scale))(outs)
    found = {"simclr/loss": Reproduced(loss)}
    return found | {f"simclr/grad_out_{i + 1}": Reproduced(grad, GRADIENT) for i, grad in enumerate(grads)}


def steps_of(case: Case, name: str, make: Callable[[float], Optimizer], clip: float) -> tuple[dict[str, np.ndarray], list[Any]]:
    """The parameters `w` and `b` after each recorded gradient, and the gradients' norms before the clip.

    The record does not name the learning rate; the first step of `b`, which does not decay, gives it: Adam's has the length of the rate,
    momentum's that of the rate times the gradient.
    """
    tensors: dict[str, Any] = {key: jnp.asarray(case.inputs[f"{name}/{key}0"], float) for key in ("w", "b")}
    first = np.asarray(case.inputs[f"{name}/grad_b"][0], np.float64)
    moved = np.asarray(tensors["b"]) - case.outputs[f"{name}/b_after"][0]
    rate = float(np.median(np.abs(moved) if name == "lamb" else moved / first))
    optimizer = make(float(f"{rate:.4g}"))
    params = {"w": {"kernel": tensors["w"]}, "b": {"bias": tensors["b"]}}
    state, norms, after = optimizer.init(params), [], []
    for number in range(len(case.inputs[f"{name}/grad_w"])):
        grads = {key: jnp.asarray(case.inputs[f"{name}/grad_{key}"][number], float) for key in ("w", "b")}
        clipped, norm = clip_by_global_norm({"w": {"kernel": grads["w"]}, "b": {"bias": grads["b"]}}, clip)
        updates, state = optimizer.update(clipped, state, params, number)
        params = jax.tree.map(jnp.add, params, updates)
        norms.append(norm)
        after.append(params)
    return {"w": np.stack([p["w"]["kernel"] for p in after]), "b": np.stack([p["b"]["bias"] for p in after])}, norms


def replay_optimizers(case: Case) -> dict[str, Reproduced]:
    """Three steps of LAMB with SparK's constants (clip 5 before it) and of LARS with SwAV's."""

    def lamb(rate: float) -> Optimizer:
        return make_optimizer("lamb", schedule=warmup_constant(rate, 0), b1=0.9, b2=0.95, eps=1e-6, weight_decay=0.04)

    def lars(rate: float) -> Optimizer:
        return make_optimizer("lars", schedule=warmup_constant(rate, 0), momentum=0.9, trust=1e-3, weight_decay=1e-6)

    found: dict[str, Reproduced] = {}
    for name, make, clip in (("lamb", lamb, 5.0), ("lars", lars, 0.0)):
        if f"{name}/w0" in case.inputs:
            after, norms = steps_of(case, name, make, clip)
            found |= {f"{name}/{key}_after": Reproduced(value) for key, value in after.items()}
            found[f"{name}/global_grad_norm"] = Reproduced(np.asarray(norms))
    return found


def replay_schedules(case: Case) -> dict[str, Reproduced]:
    """Learning rates and weight decay, whose arguments stand in their descriptions."""
    found: dict[str, Reproduced] = {}
    for name in ("spark_lr", "spark_wd", "swav_factor", "byol_lr"):
        if f"schedule/{name}" not in case.outputs:
            continue
        meaning = case.meaning("schedule/spark_lr" if name == "spark_wd" else f"schedule/{name}")
        if name.startswith("spark"):
            pattern = r"peak_lr=([\d.e-]+), wd=([\d.e-]+), wd_end=([\d.e-]+), wp_it=([\d.]+), max_it=(\d+)"
            peak, decay, decay_end, warmup, total = numbers_of(meaning, pattern)
            schedule = cosine_between(decay, decay_end, total)
            if name == "spark_lr":
                schedule = warmup_cosine_inclusive(peak, 0.001 * peak, warmup, total)
        elif name == "swav_factor":
            warmup, total = numbers_of(meaning, r"warmup_steps=(\d+), total_steps=(\d+)")
            schedule = warmup_cosine(1.0, 0.0, warmup, total)
            if "cosine=False" in meaning:
                schedule = warmup_linear(1.0, 0.0, warmup, total) if "linear=True" in meaning else warmup_constant(1.0, warmup)
        else:
            warmup, total, peak = numbers_of(meaning, r"warmup_epochs=(\d+), max_epochs=(\d+)\), base ([\d.e-]+)")
            schedule = warmup_cosine_periodic(peak, int(warmup), total)
        steps = len(case.outputs[f"schedule/{name}"])
        found[f"schedule/{name}"] = Reproduced([float(schedule(step)) for step in range(steps)])
    return found


def replay_slices(case: Case) -> dict[str, Reproduced]:
    """From stored values to Hounsfield units to the 8-bit picture."""
    slope, intercept = numbers_of(case.meaning("ct/hu"), r"slope ([-\d.]+), intercept ([-\d.]+)")
    (padding,) = numbers_of(case.record["tensors"]["inputs.safetensors"]["ct/raw"]["meaning"], r"(-?\d+) marks padding")
    units = hounsfield_units(case.inputs["ct/raw"], slope, 0, padding)
    # The released code cuts what a slope makes of whole numbers, and the intercept, to whole numbers.
    units = np.trunc(units) + np.trunc(intercept)
    mapped = stretch(units)
    return {"ct/hu": exact(units), "ct/mapped": Reproduced(mapped), "ct/png": exact(np.rint(mapped).astype(np.uint8))}


def replay_contrastive(case: Case) -> dict[str, Reproduced]:
    """Everything but SparK itself that the case has."""
    parts = {"moco/img_q": replay_moco, "byol/img_1": replay_byol, "swav/crop0": replay_swav, "simclr/out_1": replay_simclr}
    found = replay_optimizers(case) | replay_schedules(case)
    for name, part in (parts | {"ct/raw": replay_slices}).items():
        found |= part(case) if name in case.inputs else {}
    return found
