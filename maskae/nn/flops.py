"""Matmul FLOPs by formula, 2 per multiply-add. (XLA's cost analysis counts a scanned body once, so it cannot be asked.)"""

from __future__ import annotations


def linear_flops(tokens: int, inputs: int, outputs: int) -> float:
    """One linear map over `tokens` tokens."""
    return 2.0 * tokens * inputs * outputs


def cross_block_flops(queries: int, seen: int, width: int, mlp_ratio: float = 4.0) -> float:
    """A block whose `queries` tokens look at `seen` others: query and output maps 2 N D^2, key and value 2 M D^2, MLP, scores 2 N M D."""
    return 2.0 * ((2 + 2 * mlp_ratio) * queries * width**2 + 2 * seen * width**2 + 2 * queries * seen * width)


def block_flops(tokens: int, width: int, mlp_ratio: float = 4.0) -> float:
    """One transformer block: qkv and output maps 4 N D^2, MLP 2 r N D^2, scores and weighted sum 2 N^2 D multiply-adds."""
    return 2.0 * ((4 + 2 * mlp_ratio) * tokens * width**2 + 2 * tokens**2 * width)
