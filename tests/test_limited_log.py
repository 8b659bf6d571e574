"""What a member's connections may write into a site's log."""

from typing import Any

from peertune.runtimes.limited_log import BURST, REFILL_S, REPEAT_S, LimitedLog


def test_a_member_cannot_fill_the_log() -> None:
    lines: list[dict[str, Any]] = []
    now = [0.0]
    log = LimitedLog(lambda event, **about: lines.append({"event": event, **about}), clock=lambda: now[0])
    for port in range(3 * BURST):
        log("failed", peer="east", reason=str(port))
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
        log("failed", peer="east", reason="")
    assert [line["event"] for line in lines].count("failed") == 2 * BURST
    assert lines[-BURST]["suppressed"] == 1


def test_a_member_that_fetches_the_same_messages_on_stream_after_stream_cannot_fill_it_either() -> None:
    lines: list[dict[str, Any]] = []
    log = LimitedLog(lambda event, **about: lines.append({"event": event, **about}), clock=lambda: 0.0)
    for _ in range(3 * BURST):
        log("fetched", peer="east", round=0)
    assert len(lines) == 3 * BURST
    for _ in range(3 * BURST):
        log("fetched", peer="east", round=0, again=True)
    assert len(lines) == 4 * BURST


def test_a_refusal_every_round_is_written_down_once_and_then_now_and_then() -> None:
    lines: list[tuple[Any, ...]] = []
    now = [0.0]

    def write(event: str, **about: Any) -> None:
        lines.append((event, about["peer"], about["reason"], about.get("repeated")))

    log = LimitedLog(write, clock=lambda: now[0])
    for round in range(50):
        log("refused", peer="east", reason=f"sent NaN in round {round}")
        log("refused_by", peer="east", reason=f"sent NaN in round {round}")
        log("refused", peer="west", reason=f"sent NaN in round {round}")
    assert lines == [
        ("refused", "east", "sent NaN in round 0", None),
        ("refused_by", "east", "sent NaN in round 0", None),
        ("refused", "west", "sent NaN in round 0", None),
    ]
    now[0] += REPEAT_S
    log("refused", peer="east", reason="sent NaN in round 50")
    log("refused", peer="east", reason="sent bytes that are no frame")
    log("refused", peer="east", reason="sent NaN in round 51")
    assert lines[3:] == [
        ("refused", "east", "sent NaN in round 50", 49),
        ("refused", "east", "sent bytes that are no frame", None),
        ("refused", "east", "sent NaN in round 51", None),
    ]
