"""DeCAF (arXiv 2505.21382): average the products B_j A_j of the neighbours, then back to rank r by truncated SVD.

    P_i = sum_j w_ij B_j A_j  ~  B_i A_i,   B_i = U_r sqrt(S_r),  A_i = sqrt(S_r) V_r'

Averaging A and B apart would add the cross terms w_ij w_ik B_j A_k. P has rank at most k r for k neighbours: with the
factors stacked, P = [w_1 B_1 .. w_k B_k] [A_1; ..; A_k], QR of both sides leaves a core of [k r, k r], whose SVD is
P's. The product [out, in] is never formed.

Each peer's SVD has signs, an order and a basis of its own. Agreement, evaluation and export average the factors apart,
which would bring the cross terms back, so each peer turns its factors towards what it received (ours): Q orthogonal,

    (B_i Q, Q' A_i),  Q = argmin ||B_i Q - sum_j w_ij B_j||^2 + ||Q' A_i - sum_j w_ij A_j||^2

B_i A_i stays as it is. All peers start from one adapter, so their bases stay near each other from round to round.
A peer that hears nobody keeps its factors: one alone is LoRA with AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peertune.algorithms.dec_lora import TwoFactor
from peertune.config import AlgorithmConfig
from peertune.errors import ConfigError
from peertune.exchange import Hop, Inbox
from peertune.peer import Peer
from peertune.topology import Topology


class Decaf(TwoFactor):
    averages = False
    elementwise = False

    def __init__(self, peer: Peer, config: AlgorithmConfig, topology: Topology) -> None:
        super().__init__(peer, config, topology)
        for name in self.masters:
            pair = [name.replace("lora_A", factor) in self.common for factor in ("lora_A", "lora_B")]
            if "lora_A" in name and pair[0] != pair[1]:
                raise ConfigError(
                    f"algorithm.local_modules: got {config.local_modules}, which keeps one factor of {name} local, not"
                    " the other, expected both or neither, as decaf averages their product; name the layer, without"
                    " lora_A or lora_B"
                )

    @torch.no_grad()
    def mix(self, hop: Hop, inbox: Inbox) -> None:
        if not inbox.weights.keys() - {self.peer.index}:
            return
        for name in self.common:
            if "lora_A" not in name:
                continue
            other = name.replace("lora_A", "lora_B")
            peers = sorted(inbox.weights)
            factors = [(inbox.payloads[j][other], inbox.payloads[j][name]) for j in peers]
            means = inbox.mean(other), inbox.mean(name)
            try:
                b, a = average_product([inbox.weights[j] for j in peers], factors)
                # Two zero factors would never have a gradient again.
                b, a = turn_towards(b, a, *means) if b.any() else means
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # it diverged, as the loss is about to say
                b, a = means
            self.masters.write(other, b)
            self.masters.write(name, a)


def average_product(weights: Sequence[float], factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Best factors of rank r of sum_j w_j B_j A_j, in the Frobenius norm.

    Args:
        weights: w_j.
        factors: (B_j [out, r], A_j [r, in]), float32.
    Returns:
        B [out, r] and A [r, in], with B'B = A A' = the product's r largest singular values.
    """
    rank = factors[0][1].shape[0]
    q_b, r_b = torch.linalg.qr(torch.cat([b * w for w, (b, _) in zip(weights, factors, strict=True)], 1))
    q_a, r_a = torch.linalg.qr(torch.cat([a for _, a in factors], 0).T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    b, a = q_b @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ q_a.T
    short = rank - len(root)  # fewer rows or columns than the rank
    return torch.nn.functional.pad(b, (0, short)), torch.nn.functional.pad(a, (0, 0, 0, short))


def turn_towards(b: Tensor, a: Tensor, b_ref: Tensor, a_ref: Tensor) -> tuple[Tensor, Tensor]:
    """The factors (B Q, Q' A) nearest to a reference, Q [r, r] orthogonal: Procrustes' problem (Schoenemann 1966).

    Args:
        b, b_ref: [out, r], float32.
        a, a_ref: [r, in], float32.
    Returns:
        Factors of the same product, up to rounding.
    """
    u, _, vt = torch.linalg.svd(b.T @ b_ref + a @ a_ref.T)
    q = u @ vt
    return b @ q, q.T @ a
