"""SCGC: "Self-Supervised Contrastive Graph Clustering", Kulatilleke et al., 2022, arXiv 2204.12656.

Nodes are encoded by a multilayer perceptron that never sees the graph. The graph enters through the loss alone: codes of nodes that a few
steps of a random walk reach are pulled together. Soft assignments to trained centres sharpen themselves, and SCGC reconstructs the input;
SCGC* (`decode=False`) does not.

A whole graph is one record: `nodes` [1, N, D], and its weights as `neighbour_rows`, `neighbour_columns`, `neighbour_weights` [1, P], which
the source computes (`maskae.data.neighbourhoods`): the R-th power of the walk for SCGC, the sum of the first R for SCGC*.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from maskae.data.spec import DataSpec
from maskae.errors import UserError
from maskae.evaluate.clustering import fit_kmeans
from maskae.evaluate.features import to_host
from maskae.losses.blocked import Computation
from maskae.losses.neighbourhood import Neighbourhood, neighbourhood_contrast
from maskae.losses.soft_clusters import cluster_divergence, sharpened_target, student_assignment
from maskae.nn.mlp import mlp_flops
from maskae.nn.sharding import constrain
from maskae.nn.transfer import adopt_parameters
from maskae.plots import draw_embedding
from maskae.systems.autoencoder import Autoencoder
from maskae.systems.contract import Batch, Outputs, Params, State, Variables

NEIGHBOURS = ("neighbour_rows", "neighbour_columns", "neighbour_weights")


@dataclass(frozen=True)
class Scgc:
    """Arguments with the values of the paper's DBLP recipe.

    Args:
        clusters: how many.
        hidden, latent, activation: of the autoencoder, see `Autoencoder`.
        decode: reconstruct the input too (SCGC); False is SCGC*, which has no decoder.
        scale: of the cosines in the neighbourhood contrast, called tau; it multiplies them.
        contrast_weight, cluster_weight: of that term and of the sharpening one, called alpha and beta.
        freedom: degrees of freedom of Student's t.
        sampled_nodes: nodes of each step, drawn anew, with the weights among them (Graph-MLP, arXiv 2106.04051); 0 takes all.
        block: nodes at a time in the sums over all of them.
        restarts: of the k-means that gives the first centres.

    Raises:
        UserError: where a number is out of its range.
    """

    clusters: int = 4
    hidden: tuple[int, ...] = (500, 500, 2000)
    latent: int = 10
    activation: str = "relu"
    decode: bool = True
    scale: float = 0.25
    contrast_weight: float = 0.5
    cluster_weight: float = 0.1
    freedom: float = 1.0
    sampled_nodes: int = 0
    block: int = 512
    restarts: int = 20

    # Every node of the graph is in every other one's denominator.
    couples_examples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is built."""
        object.__setattr__(self, "hidden", tuple(self.hidden))
        Autoencoder(self.hidden, self.latent, self.activation)
        for name in ("clusters", "block", "restarts", "freedom"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: it must be above zero")
        for name in ("scale", "contrast_weight", "cluster_weight", "sampled_nodes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: it must not be negative")

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """The perceptrons; the stage before trains the same ones."""
        return Autoencoder(self.hidden, self.latent, self.activation)

    def inputs(self, batch: Batch) -> jax.Array:
        """Node features of the one graph, float32 [N, D], split over the devices where they divide N."""
        if batch["nodes"].shape[0] != 1:
            raise UserError(f"scgc takes one whole graph per step, and the batch has {batch['nodes'].shape[0]}: set batch_size=1")
        return constrain(batch["nodes"][0].astype(jnp.float32), "batch")

    def init(self, rng: jax.Array, batch: Batch) -> Variables:
        """Untrained perceptrons, and centres that `begin` replaces."""
        autoencoder_key, centre_key = jax.random.split(rng)
        params = self.autoencoder.init_params(autoencoder_key, batch["nodes"].shape[-1])
        if not self.decode:
            params.pop("decoder")
        return Variables(params | {"centres": jax.random.normal(centre_key, (self.clusters, self.latent))}, {})

    def with_pretrained(self, variables: Variables, pretrained: Variables) -> Variables:
        """`variables` with the pretrained autoencoder's encoder, and its decoder where there is one here. Raises UserError."""
        params = dict(variables.params)
        for part in ("encoder", "decoder"):
            if part in params:
                params[part] = adopt_parameters(params[part], pretrained.params.get(part, {}), what=part)
        return Variables(params, variables.state)

    def begin(self, variables: Variables, stage: Any) -> Variables:
        """Centres at those of k-means on the codes of all nodes."""
        encode = jax.jit(lambda params, batch: self.autoencoder.encode(params, self.inputs(batch)))
        codes = np.concatenate([to_host(encode(variables.params, batch)) for batch in stage.batches()])
        if len(codes) < self.clusters:
            raise UserError(f"clusters={self.clusters}, but there are {len(codes)} nodes")
        found = fit_kmeans(codes, self.clusters, restarts=self.restarts, seed=stage.experiment.config.seed)
        return Variables({**variables.params, "centres": found.centres}, variables.state)

    def assign(self, params: Params, codes: jax.Array) -> jax.Array:
        """Codes [N, latent] -> soft assignment [N, clusters]."""
        return student_assignment(codes, params["centres"], self.freedom)

    def terms(self, params: Params, x: jax.Array, pairs: Neighbourhood) -> dict[str, jax.Array]:
        """The unweighted losses of nodes [N, D]: `contrast`, `cluster` and, with the decoder, `reconstruction`; float32 scalars."""
        codes = constrain(self.autoencoder.encode(params, x), "batch")  # [N, latent]
        assignment = self.assign(params, codes)
        found = {
            "contrast": neighbourhood_contrast(codes, pairs, self.scale, computation=Computation(block=self.block)),
            "cluster": cluster_divergence(assignment, sharpened_target(assignment)),
        }
        if self.decode:
            found["reconstruction"] = jnp.square(self.autoencoder.decode(params, codes) - x).mean()
        return found

    def total(self, terms: Mapping[str, jax.Array]) -> jax.Array:
        """alpha L_NC + beta L_KL (+ L_RE)."""
        return self.contrast_weight * terms["contrast"] + self.cluster_weight * terms["cluster"] + terms.get("reconstruction", 0.0)

    def loss(self, params: Params, state: State, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Outputs]:
        """The loss of the whole graph, or of the sampled nodes; the target is made of the current assignment."""
        x, pairs = self.inputs(batch), Neighbourhood(*(batch[name][0] for name in NEIGHBOURS))
        if 0 < self.sampled_nodes < x.shape[0]:
            chosen = jax.random.choice(rng, x.shape[0], (self.sampled_nodes,), replace=False)
            x, pairs = x[chosen], among(pairs, chosen, x.shape[0])
        terms = self.terms(params, x, pairs)
        return self.total(terms), Outputs(terms, state)

    def features(self, params: Params, state: State, batch: Batch) -> dict[str, jax.Array]:
        """`tokens` [1, N, latent], their mean `pooled` [1, latent], and `assignment` [1, N, clusters]; no graph is needed."""
        codes = self.autoencoder.encode(params, self.inputs(batch))
        return {"pooled": codes.mean(0)[None], "tokens": codes[None], "assignment": self.assign(params, codes)[None]}

    def draw(self, params: Params, state: State, batch: Batch, rng: jax.Array, spec: DataSpec) -> dict[str, np.ndarray]:
        """Maps of the codes, coloured by cluster and, where nodes have classes, by class."""
        found = jax.jit(self.features)(params, state, batch)
        codes, assigned = np.asarray(found["tokens"][0]), np.asarray(found["assignment"][0]).argmax(1)
        pictures = {"clusters": draw_embedding(codes, assigned, title="codes by cluster")}
        if "node_label" in batch:
            pictures["classes"] = draw_embedding(codes, np.asarray(batch["node_label"][0]), title="codes by class", names=spec.class_names)
        return pictures

    def forward_flops(self, batch: Batch) -> float:
        """Linear maps and similarities of one pass over the graph's nodes."""
        nodes, features = batch["nodes"].shape[1:]
        nodes = min(nodes, self.sampled_nodes or nodes)
        widths = self.autoencoder.widths(features)
        decoder = mlp_flops(nodes, self.latent, widths["decoder"]) if self.decode else 0.0
        return mlp_flops(nodes, features, widths["encoder"]) + decoder + 2.0 * nodes * nodes * self.latent


def among(pairs: Neighbourhood, chosen: jax.Array, nodes: int) -> Neighbourhood:
    """The weights between the `chosen` of `nodes` nodes, int32 [m], in their numbering; every other pair gets weight 0."""
    place = jnp.full(nodes, -1, jnp.int32).at[chosen].set(jnp.arange(len(chosen), dtype=jnp.int32))
    rows, columns = place[pairs.rows], place[pairs.columns]
    kept = (rows >= 0) & (columns >= 0)
    return Neighbourhood(jnp.where(kept, rows, 0), jnp.where(kept, columns, 0), jnp.where(kept, pairs.weights, 0.0))
