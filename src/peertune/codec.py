"""What the numbers of a message are on their way: float32 as they stand, or bfloat16, which is half the bytes.

    bfloat16    Q(x) is one of the two bfloat16 numbers around x, drawn so that E[Q(x)] = x
                (stochastic rounding; Gupta et al. 2015, arXiv 1502.02551, section 3)

Rounding to the nearest would lose what training does: at a weight of 0.02 a step of 5e-5 is less than half of
bfloat16's unit in the last place, and would never reach a neighbour. Drawn, it does on average, and on average the mean
of all peers stays where it was. A peer's own share of its mean is not rounded, but where all who hear the same are to
have the same mean (`Hop.spreads`).

Rounded is only what is averaged with something: a message that is taken over as it is (a server's answer, an adapter on
its walk, the final agreement) travels in float32, as nothing would even its errors out.

Algorithms and runtimes know nothing of it. The draws are of (run seed, peer, round, hop), so every runtime sends the
same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from peertune.config import ExchangeSection
from peertune.errors import ConfigError
from peertune.exchange import Hop, Payload
from peertune.seeds import derive_seed
from peertune.wire import parts_of

PIECE = 1 << 20
"""Numbers that are rounded at a time, so that the draws take little room."""


def check_codec(rule: ExchangeSection, method: str, averages: bool) -> None:
    """Refuse methods that do with messages what a rounding error does not survive. Raises ConfigError.

    Args:
        averages: whether the method takes nothing but means from its inbox.
    """
    if rule.codec != "float32" and not averages:
        raise ConfigError(
            f"exchange.codec: got {rule.codec!r}, but {method} does not only average what it receives; expected"
            " 'float32', or take another method"
        )


def is_coded(rule: ExchangeSection, hop: Hop) -> bool:
    """Whether the hop's messages are rounded: whoever receives any averages several."""
    receivers = {target for source, target in hop.weights if source != target}
    return rule.codec != "float32" and bool(receivers) and all(len(hop.sources(target)) > 1 for target in receivers)


def coded(payload: Payload, seed: int, *purpose: int | str) -> Payload:
    """The message as it travels.

    Args:
        payload: float32 tensors.
        seed, purpose: whose draws these are, as for `derive_seed`.
    Returns:
        bfloat16 tensors of the same names and shapes, side by side in the order of their names.
    """
    if not payload:
        return payload
    flat = torch.cat([payload[name].reshape(-1) for name in sorted(payload)])
    if flat.sum().isnan():
        flat.masked_fill_(flat.isnan(), math.nan)  # the NaN of GPUs, whose bits are all set, would carry over into zero
    generator = torch.Generator(flat.device).manual_seed(derive_seed(seed, *purpose))
    rounded = torch.empty(flat.shape, dtype=torch.bfloat16, device=flat.device)
    for x, q in zip(torch.split(flat, PIECE), torch.split(rounded, PIECE), strict=True):
        q.copy_(_rounded(x, generator))
    return parts_of(rounded, payload)


def _rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """Stochastic rounding of float32 to what bfloat16 holds, whose bits are float32's upper half.

    A number drawn below 2^16 is added to the bits: the larger the lower half, the likelier it carries over into the
    upper half, which makes that the next number away from zero.
    """
    drawn = torch.empty(x.shape, dtype=torch.int32, device=x.device).random_(0, 1 << 16, generator=generator)
    bits = drawn.add_(x.view(torch.int32)).bitwise_and_(-1 << 16)
    return bits.view(torch.float32)
