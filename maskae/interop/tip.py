"""TIP's reference cases, and its weights under the names of the released code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskae.errors import UserError
from maskae.interop.case import GRADIENT, Case, Reproduced, exact
from maskae.interop.cnn import foreign_names, load, resnet
from maskae.interop.layout import LINEAR, OUT_PROJECTION, VALUE, VECTOR, Layout, Rule
from maskae.interop.vit import linear, norm, paper_block
from maskae.losses.tables import negative_weights
from maskae.schedules import warmup_cosine_periodic
from maskae.systems.contract import Variables
from maskae.systems.tip import Draws, Rows, Tip

CERTAIN = 1e6  # Gumbel noise that no weight outdoes
ROUNDING, ROUNDING_SHARE = 1e-9, 1e-6
# One matrix there, two maps here.
PAIRED, PARTS = "cross_attn.kv_proj.weight", ("cross_attn.key.weight", "cross_attn.value.weight")


def _layout() -> Layout:
    rules: list[Rule] = [*resnet("encoder/", "encoder_imaging.")]
    for ours, theirs in (("image", "imaging"), ("table", "tabular")):
        rules += linear(f"{ours}_projector/fc1", f"projector_{theirs}.layers.0")
        rules += linear(f"{ours}_projector/fc2", f"projector_{theirs}.layers.2")
    table, fusion = "encoder_tabular", "encoder_multimodal"
    whole = {"category": "cat_embedding.weight", "cls_token": "cls_token", "mask_token": "mask_special_token"}
    whole["column"] = "column_embedding.weight"
    rules += [Rule(f"table/{ours}", (f"{table}.{theirs}",), VALUE) for ours, theirs in whole.items()]
    rules += [*linear("table/number", f"{table}.con_proj"), *norm("table/norm", f"{table}.norm")]
    rules += paper_block("table/block_{i}", f"{table}.transformer_blocks.{{i}}")
    block, their_block = "fusion/block_{i}", f"{fusion}.transformer_blocks.{{i}}"
    cross = f"{block}/cross_attention"
    rules += [*paper_block(block, their_block), *norm(f"{block}/cross_norm", f"{their_block}.cross_norm")]
    rules += linear(f"{cross}/query", f"{their_block}.cross_attn.q_proj")
    names = zip(("key", "value"), PARTS, strict=True)
    rules += [Rule(f"{cross}/{name}/kernel", (f"{their_block}.{part}",), LINEAR) for name, part in names]
    rules += [Rule(f"{cross}/out/kernel", (f"{their_block}.cross_attn.proj.weight",), OUT_PROJECTION)]
    rules += [Rule(f"{cross}/out/bias", (f"{their_block}.cross_attn.proj.bias",), VECTOR)]
    rules += [*linear("fusion/image_embed", f"{fusion}.image_proj"), *norm("fusion/image_norm", f"{fusion}.image_norm")]
    rules += [*norm("fusion/norm", f"{fusion}.norm"), *linear("predictor/category", "predictor_tabular.cat_classifier")]
    rules += [*linear("predictor/number", "predictor_tabular.con_regressor"), *linear("matching/fc2", "itm_head")]
    return Layout(tuple(rules))


LAYOUT = _layout()


def split_pairs(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The released tensors with the map of keys and values as two."""
    found: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        parts = np.split(value, 2) if name.endswith(PAIRED) else [value]
        names = [name.replace(PAIRED, part) for part in PARTS] if len(parts) == 2 else [name]
        found |= dict(zip(names, parts, strict=True))
    return found


def official_names(tree: Any) -> dict[str, np.ndarray]:
    """Parameters, gradients or statistics under the released names and in their shapes."""
    found = foreign_names(tree, LAYOUT)
    for name in [name for name in found if name.endswith(PARTS[0])]:
        stem = name.removesuffix(PARTS[0])
        found[stem + PAIRED] = np.concatenate([found.pop(stem + part) for part in PARTS])
    return found


def check_options(built: Mapping[str, Any]) -> None:
    """Raises UserError for an option whose random draws no case has, and for an image encoder that the system does not have."""
    options = built["hparams"]
    if not options.get("model", "resnet").startswith("resnet"):
        raise UserError(f"hparams.model={options['model']}: only a case whose image encoder is a residual network can be replayed")
    rates = {f"hparams.{name}": options.get(name, 0) for name in ("embedding_dropout", "drop_rate")}
    for name, rate in (rates | {"replace_random_rate": built.get("replace_random_rate", 0)}).items():
        if rate:
            raise UserError(f"{name}={rate}: its random draws are not recorded, so that only a rate of 0 can be replayed")


def system_of(case: Case) -> Tip:
    """The system with the case's own sizes and options, to be used under `jax.enable_x64`. Raises UserError as `check_options` does."""
    built, options = case.record["config"], case.record["config"]["hparams"]
    check_options(built)
    weights, layers = case.weights, tuple(built["resnet"]["layers"])
    stages = range(1, len(layers) + 1)
    return Tip(
        image_size=options["img_size"],
        channels=case.inputs["image"].shape[1],
        network="resnet50" if built["resnet"]["block"] == "Bottleneck" else "resnet18",
        layers=layers,
        widths=tuple(weights[f"encoder_imaging.layer{i}.0.conv1.weight"].shape[0] for i in stages),
        stem_width=weights["encoder_imaging.conv1.weight"].shape[0],
        cardinalities=tuple(length for length in built["field_lengths"] if length != 1),
        continuous=built["field_lengths"].count(1),
        table_width=options["multimodal_embedding_dim"],
        table_depth=options["tabular_transformer_num_layers"],
        fusion_depth=options["multimodal_transformer_num_layers"],
        projection=options["projection_dim"],
        temperature=options["temperature"],
        image_share=options.get("lambda_0", 0.5),
        corruption=built.get("corruption_rate", 0.3),
        mask_ratio=built.get("replace_special_rate", 0.5),
        marginal_rows=len(case.inputs["marginal_rows"]),
        dtype="float64",
    )


def inputs_of(case: Case, system: Tip) -> tuple[jax.Array, Rows, Draws]:
    """The recorded images, rows and draws."""
    given = case.inputs
    shape = given["table"].shape
    corrupted, rows, hidden = np.zeros(shape, bool), np.zeros(shape, np.int32), np.zeros(shape, bool)
    np.put_along_axis(corrupted, given["corrupt_columns"], True, 1)
    np.put_along_axis(rows, given["corrupt_columns"], given["corrupt_rows"], 1)
    np.put_along_axis(hidden, given["mask_columns"], True, 1)
    noise = np.stack([np.eye(shape[0])[given[name]] * CERTAIN for name in ("neg_table", "neg_image")])
    draws = Draws(*(jnp.asarray(x) for x in (corrupted, rows, hidden, noise)))
    table = Rows(jnp.asarray(given["table"], float), jnp.zeros(shape, bool))
    return system.normalised(jnp.asarray(given["image"], float).transpose(0, 2, 3, 1)), table, draws


def replay_inside(system: Tip, params: Any, named: Mapping[str, Any], rows: Rows, draws: Draws) -> dict[str, Any]:
    """Tokens between the blocks, and projections before they are normed."""
    table = {"params": params["table"]}
    encoder, fusion = system.table_encoder, system.fusion
    apply: Any = encoder.apply
    found = {"tab_embedding": apply(table, named["corrupted"], rows.missing, method="embed")}
    found["tab_block0"] = apply(table, named["corrupted"], rows.missing, True).blocks[0]
    found["tab_embedding_masked"] = apply(table, rows.table, draws.hidden, method="embed")
    apply = fusion.apply
    found["mm_block0"] = apply({"params": params["fusion"]}, named["compared"], named["seen"], True, method="fuse").blocks[0]
    found["z_image"] = system.part("image_projector", params, named["map"].mean((1, 2)))
    return found | {"z_table": system.part("table_projector", params, named["compared"][:, 0])}


def replay_forward(case: Case, system: Tip, params: Any, state: Any) -> dict[str, Reproduced]:
    """Every intermediate result and loss of the recorded step."""
    images, rows, draws = inputs_of(case, system)

    @jax.jit
    def forward(params: Any) -> Any:
        loss, metrics, named = system.loss_given_draws(params, state, images, rows, draws)
        return {**metrics, "loss": loss}, named, replay_inside(system, params, named, rows, draws)

    losses, named, inside = forward(params)
    batch = len(images)
    found = inside | {"image_features": named["map"].transpose(0, 3, 1, 2), "tab_tokens": named["compared"]}
    found |= {"tab_tokens_masked": named["masked"], "image_tokens": named["seen"], "mm_pos": named["pairs"][:batch]}
    found |= {"mm_mtr": named["recovered"], "cat_logits": named["cells"][0], "con_pred": named["cells"][1][..., None]}
    found |= {"itm_logits": named["matches"], "itc_logits": named["similarity"]}
    found |= {"weights_i2t": negative_weights(named["similarity"]), "weights_t2i": negative_weights(named["similarity"].T)}
    short = {"contrastive": "itc", "matching": "itm", "reconstruction": "mtr", "categorical": "mtr_cat", "continuous": "mtr_con"}
    found |= {f"loss_{theirs}": losses[f"{ours}_loss"] for ours, theirs in short.items()} | {"loss": losses["loss"]}
    found |= {f"after1/{name}": value for name, value in official_names({"encoder": named["statistics"]}).items()}
    same = {"table_corrupted": named["corrupted"], "mask": draws.hidden.astype(jnp.int32), "table_masked_view": rows.table}
    return {name: Reproduced(value) for name, value in found.items()} | {name: exact(value) for name, value in same.items()}


def replay_evaluation(case: Case, system: Tip, params: Any, state: Any) -> dict[str, Reproduced]:
    """With running statistics: the class token of the clean rows, and the classifier's logits with missing cells."""
    images, rows, _ = inputs_of(case, system)
    missing = jnp.asarray(case.inputs.get("missing_mask", np.zeros(rows.table.shape))) > 0

    @jax.jit
    def forward(params: Any) -> tuple[jax.Array, ...]:
        last = system.encode(params["encoder"], state["encoder"], images, train=False)[0].maps[-1]
        seen = system.part("fusion", params, last, method="see")
        return last, *(system.fused(params, seen, each)[1][:, 0] for each in (rows, rows._replace(missing=missing)))

    last, clean, incomplete = forward(params)
    found = {"eval/image_features": last.transpose(0, 3, 1, 2), "eval/embedding": clean}
    if "finetune/classifier.weight" in case.weights:
        found["finetune/logits"] = incomplete @ case.weights["finetune/classifier.weight"].T + case.weights["finetune/classifier.bias"]
    return {name: Reproduced(value) for name, value in found.items()}


def replay_gradients(case: Case, system: Tip, params: Any, state: Any) -> dict[str, Reproduced]:
    """`grad/<name>` and `gradnorm/<name>` of the whole loss."""
    images, rows, draws = inputs_of(case, system)
    grads = jax.jit(jax.grad(lambda p: system.loss_given_draws(p, state, images, rows, draws)[0]))(params)
    named = official_names(grads)
    norms = {name: float(np.linalg.norm(grad.astype(np.float64).ravel())) for name, grad in named.items()}
    found = {f"grad/{name}": Reproduced(grad, GRADIENT) for name, grad in named.items()}
    for name, value in norms.items():
        recorded = case.outputs.get(f"gradnorm/{name}", value)
        part = max(other for key, other in norms.items() if key.split(".")[0] == name.split(".")[0])
        absolute, note = (ROUNDING_SHARE * part, "its true gradient is 0") if recorded < ROUNDING else (0.0, "")
        found[f"gradnorm/{name}"] = Reproduced(value, GRADIENT, absolute, note=note)
    return found


def replay_schedule(case: Case) -> dict[str, Reproduced]:
    """The learning rate of each recorded epoch. Raises UserError for a scheduler that the released code does not have."""
    options, epochs = case.record["config"]["hparams"], np.arange(len(case.outputs["lr_per_epoch"]))
    if options["scheduler"] == "anneal":
        rates = warmup_cosine_periodic(options["lr"], options["warmup_epochs"], options["max_epochs"])
    elif options["scheduler"] == "cosine":
        rates = warmup_cosine_periodic(options["lr"], 0, int(options["dataset_length"] * options["cosine_anneal_mult"]))
    else:
        raise UserError(f"hparams.scheduler={options['scheduler']}: a schedule is replayed of 'anneal' and of 'cosine'")
    return {"lr_per_epoch": Reproduced(np.asarray(rates(epochs)))}


def variables_of(case: Case, system: Tip) -> Variables:
    """The recorded weights, statistics and marginals. Raises UserError where one is missing or has another shape."""
    tensors = split_pairs(case.weights)
    batch = {"table": case.inputs["table"], "table_missing": case.inputs["table"]}
    template = jax.eval_shape(system.init, jax.random.key(0), batch)
    params = load(tensors, template.params, LAYOUT, "tip")
    state = load(tensors, {"encoder": template.state["encoder"]}, LAYOUT, "tip")
    return Variables(params, state | {"marginals": jnp.asarray(case.inputs["marginal_rows"], float)})


def replay(case: Case) -> dict[str, Reproduced]:
    """Every recorded output of a TIP case that is there to compare."""
    found = replay_schedule(case) if case.wants("lr_per_epoch") else {}
    # As it was recorded. In float32 a rectifier's input that lies within rounding of 0 takes the other side, which moves gradients of the
    # image encoder by up to 4e-2 of their largest value.
    with jax.enable_x64(True):
        system = system_of(case)
        variables = variables_of(case, system)
        for part in (replay_forward, replay_evaluation, *([replay_gradients] if case.wants("grad") else [])):
            found |= part(case, system, *variables)
    return found
