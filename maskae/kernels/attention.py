"""Masked attention of one signature over several implementations, forward and backward.

`xla` is plain JAX (maskae.kernels.attention_reference), `pallas_tpu` and `pallas_gpu` are Pallas kernels in which neither scores nor biases
of size N x M exist in memory (the order of FlashAttention-2, Dao 2023, arXiv 2307.08691), `cudnn` is NVIDIA's kernel where it applies.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maskae.errors import UserError, check_choice
from maskae.kernels.attention_reference import attend, attend_plainly, is_plain
from maskae.kernels.choice import choose
from maskae.kernels.operands import IMPLEMENTATIONS, Operands, Options, feature_names
from maskae.kernels.partition import Split

# Implementation -> (module with `forward` and `backward`, the platform it is compiled for).
KERNELS = {"pallas_tpu": ("maskae.kernels.attention_tpu", "tpu"), "pallas_gpu": ("maskae.kernels.attention_gpu", "cuda")}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    slopes: jax.Array | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str = "auto",
    with_log_sum_exp: bool = False,
) -> Any:
    """softmax(cap(scale * q . k - slopes[h] * ||p_i - p_j||)) v over the keys that each query may see.

    Args:
        query: [B, N, H, D].
        key, value: [B, M, H, D], of the same dtype.
        key_mask: bool [B, M], True where a key may be attended to.
        query_segments, key_segments: int32 [B, N], [B, M], above -2**31: a query sees only keys of its own segment (several samples packed
            into one row).
        query_positions, key_positions: float32 [B, N, C], [B, M, C], C 1 to 3, with `slopes` float32 [H]: the distance bias of ALiBi in one
            or more dimensions (Press et al. 2022; CROMA, Fuller et al. 2023, section 3). Positions are constants: no gradient.
        soft_cap: cap * tanh(score / cap), after scale and bias, before the softmax.
        scale: a number; D**-0.5 by default.
        implementation: one of `IMPLEMENTATIONS`. "auto" takes what the benchmark found fastest for this device, length and options
            (maskae.kernels.choice), and `xla` where nothing was measured. The device is that of the ambient mesh (`jax.set_mesh`), else
            this process's. The kernels of another platform run interpreted: right, slow, for tests.
        with_log_sum_exp: also return the log of each row's sum of exponentials.

    Returns:
        [B, N, H, D] in the dtype of `query`, or that and float32 [B, H, N]; both are differentiable in query, key, value and slopes. A
        query that sees no key gets 0 (and -inf) and no gradient. Sums and softmax are in float32, products in the inputs' dtype.

    Raises:
        UserError: shapes or dtypes that do not fit; an implementation that is unknown or cannot do this.
    """
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    options = Options(scale, None if soft_cap is None else float(soft_cap))
    operands = Operands(query, key, value, key_mask, query_segments, key_segments, query_positions, key_positions, slopes)
    check(options, operands)
    name = resolve(implementation, options, operands)
    if name == "cudnn":
        _check_cudnn(options, operands, with_log_sum_exp)
        return _attend_cudnn(options, operands)
    if name in KERNELS:
        out, log_sum_exp = _fused(name, options, _normalized(operands))
    elif is_plain(options, operands) and not with_log_sum_exp:
        return attend_plainly(options, operands)
    else:
        out, log_sum_exp = attend(options, operands)
    return (out, log_sum_exp) if with_log_sum_exp else out


def resolve(implementation: str, options: Options, operands: Operands) -> str:
    """The name of what runs: "auto" resolved for the device. Raises UserError for an unknown name."""
    check_implementation(implementation)
    if implementation != "auto":
        return implementation
    query = operands.query
    lengths = query.shape[1], operands.key.shape[1]
    return choose(_device_kind(), *lengths, query.shape[-1], query.dtype, feature_names(options, operands))


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.devices()[0].device_kind if device is None else str(device.device_kind)


def check_implementation(name: str) -> None:
    """Raises UserError for an unknown name."""
    check_choice("attention", name, IMPLEMENTATIONS)


def check_cudnn(dtype: Any) -> None:
    """Raises UserError where NVIDIA's kernel cannot run; jax itself says so late, and with a traceback."""
    if jax.default_backend() != "gpu":
        raise UserError(f"attention 'cudnn' needs an NVIDIA GPU, and this process runs on {jax.default_backend()}; use attention 'xla'")
    if jnp.dtype(dtype).itemsize != 2:
        raise UserError(f"attention 'cudnn' computes in 16 bits, and dtype is {jnp.dtype(dtype)}; use dtype 'bfloat16' or attention 'xla'")


def check(options: Options, operands: Operands) -> None:
    """Raises UserError where shapes or dtypes do not fit together."""
    query, key, value = operands[:3]
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape or query.shape[::2] != key.shape[::2] or query.shape[3] != key.shape[3]:
        raise UserError(f"attention: query {query.shape}, key {key.shape}, value {value.shape} must be [B, N, H, D], [B, M, H, D] twice")
    if not (query.dtype == key.dtype == value.dtype) or not jnp.issubdtype(query.dtype, jnp.floating):
        raise UserError(f"attention: query {query.dtype}, key {key.dtype}, value {value.dtype} must be of one floating dtype")
    if 0 in query.shape or 0 in key.shape:
        raise UserError(f"attention: query {query.shape} and key {key.shape} must not be empty")
    if options.soft_cap is not None and options.soft_cap <= 0:
        raise UserError(f"attention: soft_cap={options.soft_cap} must be above 0")
    _check_companions(operands)


def _check_companions(operands: Operands) -> None:
    """Raises UserError where what comes along with queries and keys does not fit them."""
    (batch, queries, heads), keys = operands.query.shape[:3], operands.key.shape[1]
    if (operands.query_segments is None) != (operands.key_segments is None):
        raise UserError("attention: query_segments and key_segments come together or not at all")
    if len({each is None for each in operands[6:]}) != 1:
        raise UserError("attention: query_positions, key_positions and slopes come together or not at all")
    if operands.key_mask is not None and operands.key_mask.dtype != jnp.bool_:
        raise UserError(f"attention: key_mask is {operands.key_mask.dtype}, and must be bool: True where a key may be attended to")
    for name in ("query_segments", "key_segments"):
        segments = getattr(operands, name)
        if segments is not None and not jnp.issubdtype(segments.dtype, jnp.integer):
            raise UserError(f"attention: {name} is {segments.dtype}, and must be of integers")
    dimensions = None if operands.query_positions is None else operands.query_positions.shape[-1]
    if dimensions is not None and not 1 <= dimensions <= 3:
        raise UserError(f"attention: positions of {dimensions} dimensions; there must be 1, 2 or 3")
    wanted = {
        "key_mask": (batch, keys),
        "query_segments": (batch, queries),
        "key_segments": (batch, keys),
        "query_positions": (batch, queries, dimensions),
        "key_positions": (batch, keys, dimensions),
        "slopes": (heads,),
    }
    for name, shape in wanted.items():
        array = getattr(operands, name)
        if array is not None and array.shape != shape:
            raise UserError(f"attention: {name} has shape {array.shape}, and must have {shape}")


def _normalized(operands: Operands) -> Operands:
    """What the kernels are given: int32 segments, float32 positions and slopes."""
    integers = {name: getattr(operands, name) for name in ("query_segments", "key_segments")}
    floats = {name: getattr(operands, name) for name in ("query_positions", "key_positions", "slopes")}
    changed: dict[str, Any] = {name: None if each is None else each.astype(jnp.int32) for name, each in integers.items()}
    changed |= {name: None if each is None else each.astype(jnp.float32) for name, each in floats.items()}
    return operands._replace(**changed)


def _check_cudnn(options: Options, operands: Operands, with_log_sum_exp: bool) -> None:
    """Raises UserError where NVIDIA's kernel cannot do what is asked."""
    check_cudnn(operands.query.dtype)
    lacking = {
        "soft cap": options.soft_cap is not None,
        "positions": operands.slopes is not None,
        "segments": operands.query_segments is not None,
        "returned log-sum-exp": with_log_sum_exp,
    }
    if any(lacking.values()):
        names = ", ".join(name for name, is_asked in lacking.items() if is_asked)
        raise UserError(f"attention 'cudnn' has no {names}; use attention 'pallas_gpu' or 'xla'")


def _attend_cudnn(options: Options, operands: Operands) -> jax.Array:
    """NVIDIA's kernel; a key mask becomes a mask of [B, 1, N, M] in memory."""
    query, key, value, key_mask = operands[:4]
    if key_mask is None:
        return jax.nn.dot_product_attention(query, key, value, scale=options.scale, implementation="cudnn")
    # Rows without keys attend to all of them, and their output is then dropped: neither value nor gradient can be NaN.
    nothing = ~key_mask.any(1)[:, None]  # [B, 1]
    mask = jnp.broadcast_to((key_mask | nothing)[:, None, None], (query.shape[0], 1, query.shape[1], key.shape[1]))
    out = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=options.scale, implementation="cudnn")
    return jnp.where(nothing[..., None, None], jnp.zeros_like(out), out)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(name: str, options: Options, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Output [B, N, H, D] and log-sum-exp [B, H, N] of the kernel `name`, on each device of the ambient mesh its rows and heads."""
    split = Split(operands.query.shape[0], operands.query.shape[2])

    def forward(operands: Operands) -> tuple[jax.Array, jax.Array]:
        return _on_platform(name, "forward", options, operands)

    outputs = split.spec("batch", None, "heads"), split.spec("batch", "heads")
    return split.run(forward, (_specs(split, operands),), outputs)(operands)


def _fused_forward(name: str, options: Options, operands: Operands) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    out, log_sum_exp = _fused(name, options, operands)
    return (out, log_sum_exp), (operands, out, log_sum_exp)


def _fused_backward(name: str, options: Options, kept: tuple[Any, ...], gradients: tuple[jax.Array, jax.Array]) -> tuple[Operands]:
    operands = kept[0]
    split = Split(operands.query.shape[0], operands.query.shape[2])

    def backward(*arguments: Any) -> tuple[Any, ...]:
        d_query, d_key, d_value, d_slopes = _on_platform(name, "backward", options, *arguments)
        # Each device has the slopes' gradient from its own rows.
        return d_query, d_key, d_value, None if d_slopes is None else split.sum_over_batch(d_slopes)

    tokens, rows = split.spec("batch", None, "heads"), split.spec("batch", "heads")
    slopes = None if operands.slopes is None else split.spec("heads")
    run = split.run(backward, (_specs(split, operands), tokens, rows, tokens, rows), (tokens, tokens, tokens, slopes))
    d_query, d_key, d_value, d_slopes = run(*kept, *gradients)
    nothing = Operands(d_query, d_key, d_value)
    return (nothing._replace(slopes=d_slopes),)


_fused.defvjp(_fused_forward, _fused_backward)


def _specs(split: Split, operands: Operands) -> Operands:
    specs = [split.spec("batch", None, "heads")] * 3 + [split.spec("batch")] * 5 + [split.spec("heads")]
    used: Any = [None if array is None else spec for array, spec in zip(operands, specs, strict=True)]
    return Operands(*used)


def _on_platform(name: str, which: str, options: Options, *arguments: Any) -> Any:
    """A kernel's `forward` or `backward`, compiled for its own platform and interpreted on any other."""
    module_name, platform = KERNELS[name]
    function = getattr(importlib.import_module(module_name), which)
    compiled, interpreted = (partial(function, options, interpret=interpret) for interpret in (False, True))
    return jax.lax.platform_dependent(*arguments, default=interpreted, **{platform: compiled})
