"""What a member's connections may write into a site's log."""

from typing import Any

from peertune.runtimes.limited_log import BURST, REFILL_S, LimitedLog


def test_a_member_cannot_fill_the_log() -> None:
    lines: list[dict[str, Any]] = []
    now = [0.0]
    log = LimitedLog(lambda event, **about: lines.append({"event": event, **about}), clock=lambda: now[0])
    for port in range(3 * BURST):
        log("refused", peer="east", reason=str(port))
        log("stranger", peer=f"ipv4:10.0.0.1:{port}")
    assert len(lines) == 2 * BURST and all("suppressed" not in line for line in lines)
    log("refused", peer="west", reason="of its own")
    for _ in range(BURST):
        log("sent", peer="east", bytes=1)
    assert len(lines) == 3 * BURST + 1, "another member's lines, and those about messages, all come"
    now[0] += REFILL_S + 1e-6
    log("connected", peer="east")
    log("disconnected", peer="east")
    assert lines[-1] == {"event": "connected", "peer": "east", "suppressed": 2 * BURST}
    now[0] += 1e9
    for _ in range(2 * BURST):
        log("refused", peer="east", reason="")
    assert [line["event"] for line in lines].count("refused") == 2 * BURST + 1
    assert lines[-BURST]["suppressed"] == 1
