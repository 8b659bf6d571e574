"""Messages are safetensors files, and what is counted is what they hold."""

from typing import Any

import pytest
import torch
from safetensors.torch import load

from peertune.exchange import Hop
from peertune.runtimes.simulation import Mailbox
from peertune.wire import Traffic, header, payload_size


def make_payload() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng) for name, shape in {"b": (3, 5), "a": (7,), "scalar": ()}.items()}


def test_header_and_tensors_are_a_safetensors_file() -> None:
    payload = make_payload()
    body = b"".join(payload[name].numpy().tobytes() for name in sorted(payload))
    assert len(header(payload)) % 8 == 0 and len(body) == payload_size(payload)
    found = load(header(payload) + body)
    assert found.keys() == payload.keys()
    for name, tensor in payload.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_only_float32_travels_or_a_methods_own_bits() -> None:
    with pytest.raises(TypeError, match=r"a payload's 'a' is torch\.float64, expected torch\.float32"):
        header({"a": torch.zeros(2, dtype=torch.float64)})
    bits = {"signs": torch.arange(3, dtype=torch.uint8), "scale": torch.zeros(1).view(torch.uint8)}
    assert payload_size(bits) == 7 and load(header(bits) + bytes(7))["scale"].dtype == torch.uint8
    with pytest.raises(TypeError, match=r"a payload's 'signs' is torch\.uint8 beside torch\.float32"):
        header({**bits, "scale": torch.zeros(1)})


def test_traffic_is_counted_by_edge_payload_and_header_apart() -> None:
    payload, traffic = make_payload(), Traffic()
    size, head = 4 * (15 + 7 + 1), len(header(payload))
    assert traffic.count([3, 1], payload) == 2 * (size + head)
    assert traffic.count([1], payload) == size + head
    assert traffic.by_target() == [(1, 2 * size, 2 * head), (3, size, head)]
    assert (traffic.payload_bytes, traffic.header_bytes) == (3 * size, 3 * head)
    again = Traffic()
    again.load_state_dict(traffic.state_dict())
    assert again == traffic
    assert again.count([1], payload, is_control=True) == size + head
    assert again.by_target()[0] == (1, 2 * size, 2 * head + size + head)


@pytest.mark.parametrize(
    ("target", "change", "said"),
    [
        (7, {}, "peer 0 sends to 7, expected one of 2"),
        (1, {"more": torch.zeros(1)}, "peer 1 sends tensors of other names or shapes than peer 0"),
        (1, {"b": torch.zeros(5, 3)}, "peer 1 sends tensors of other names or shapes than peer 0"),
    ],
)
def test_a_simulation_refuses_what_peers_apart_could_not_carry(target: int, change: Any, said: str) -> None:
    mailbox = Mailbox()
    ends = [mailbox.endpoint(peer) for peer in (0, 1)]
    hop = Hop("gossip", {(0, target): 0.5, (1, 0): 0.5})
    with pytest.raises(ValueError, match=said):
        for end, payload in zip(ends, (make_payload(), make_payload() | change), strict=True):
            end.start(0, hop, payload)


def test_a_simulation_asks_who_only_receives_what_it_would_send_as_peers_apart_do() -> None:
    """A server whose `outgoing` differs from its clients', or fails there, else fails only where it is a process."""
    mailbox = Mailbox()
    client, server = mailbox.endpoint(0), mailbox.endpoint(1)
    hop = Hop("up", {(0, 1): 1.0})
    client.start(0, hop, make_payload())
    assert client.finish(0, hop, lambda: pytest.fail("nothing comes here")) is None
    with pytest.raises(ValueError, match=r"hop 'up': peer 1 sends tensors .* than peer 0; .* that only receives"):
        server.finish(0, hop, lambda: {"tau": torch.zeros(())})
