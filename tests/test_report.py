"""The report: what it shows for whole, young, small and large runs, and that it is safe and self-contained."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from peertune import formatting
from peertune.errors import CheckpointError
from peertune.report import charts, series, write_report
from peertune.report.events import read_run
from peertune.report.graph import heat_map
from peertune.report.page import SECTIONS
from peertune.run import run
from peertune.seeds import numpy_rng
from peertune.watch import read_state, status_lines
from peertune.watch.page import fragments
from tests.recipes import recipe

LABELS = ("Business", "Sci/Tech", "Sports", "World")
BLOCKS = ("layers 0", "layers 1", "layers 2", "layers 3", "final norm and head")
VOID = {"meta", "br", "link", "img"}
Events = list[dict[str, Any]]


def metropolis(num_peers: int, edges: Sequence[tuple[int, int]]) -> list[list[float]]:
    """A mixing matrix with rows that sum to 1, as a run writes it."""
    degree = Counter(node for edge in edges for node in edge)
    weights = [[0.0] * num_peers for _ in range(num_peers)]
    for i, j in edges:
        weights[i][j] = weights[j][i] = 1 / (1 + max(degree[i], degree[j]))
    for i, row in enumerate(weights):
        row[i] = 1 - sum(row)
    return weights


def synthetic_events(
    num_peers: int = 8,
    num_rounds: int = 240,
    labels: Sequence[str] = LABELS,
    blocks: Sequence[str] = BLOCKS,
    task: str = "classification",
    inner_steps: int = 12,
    seed: int = 0,
) -> Events:
    """The events of a finished DECA run with plausible numbers."""
    rng = numpy_rng(seed, "report")
    pairs = [(i, j) for i in range(num_peers) for j in range(i + 1, num_peers)]
    kept = [p for p in pairs if rng.random() < min(0.5, 6 / num_peers) or p[1] - p[0] == 1]
    weights = metropolis(num_peers, kept)
    shares = rng.dirichlet([0.25] * num_peers, size=len(labels)) if labels else []
    held = [{label: int(3000 * shares[c][p]) for c, label in enumerate(labels)} for p in range(num_peers)]
    samples = [sum(h.values()) + 40 for h in held]
    classification = task == "classification"

    def metrics(progress: float, peer: bool = False) -> dict[str, float]:
        loss = 2.9 - 2.1 * progress + (0.2 * rng.random() * progress if peer else 0)
        if not classification:
            return {"loss": loss, "perplexity": math.exp(loss)}
        accuracy = 0.27 + 0.61 * progress - (0.1 * rng.random() * progress if peer else 0)
        return {"loss": loss, "accuracy": accuracy, "macro_f1": accuracy - 0.02}

    time = 1_760_000_000.0
    events: Events = [
        {
            "event": "start",
            "time": time,
            "config": {
                "run": {"seed": seed, "num_peers": num_peers, "out": "runs/latest", "device": "auto", "log_every": 1},
                "model": {"path": "tiny", "dtype": "float32", "max_length": 256},
                "data": {
                    "train": "stdlib" if not classification else "ag_news/train.parquet",
                    "task": task,
                    "batch_size": 8,
                    "partition": {"kind": "dirichlet", "alpha": 0.25, "column": "", "min_size": 1, "seed": None},
                },
                "topology": {"kind": "erdos_renyi", "p": 0.5, "edges": [], "weights": "metropolis"},
                "algorithm": {
                    "name": "deca" if num_peers > 1 else "pooled",
                    "lr": 5e-5,
                    "betas": [0.9, 0.999],
                    "inner_steps": inner_steps,
                    "moment_correction": True,
                },
                "eval": {"every": 40, "max_samples": 1000},
            },
            "versions": {"peertune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.3"},
            "notes": ["Tied embeddings are frozen (model.train_embeddings = untied)."],
            "model": {"parameters": 4_213_760, "trained": 3_150_000, "frozen": ["model.embed_tokens.weight"]},
            "blocks": [
                {"index": i, "name": name, "parameters": 740_000 - 17_000 * i, "tensors": 9}
                for i, name in enumerate(blocks)
            ],
            "peers": [
                {
                    "samples": samples[p],
                    "sequences": samples[p] - p % 3,
                    "tokens": samples[p] * 61,
                    "cut": 3 * p,
                    "dropped": 0,
                    "classes": {k: v for k, v in held[p].items() if v},
                }
                for p in range(num_peers)
            ],
            "edges": [list(p) for p in kept],
            "weights": weights if num_peers > 1 else [],
            "lambda2": 0.743 if num_peers > 1 else 0.0,
            "rounds": num_rounds,
        },
        {"event": "eval", "time": time, "round": 0, "average_model": metrics(0), "peers": None},
    ]
    sent = [0] * num_peers
    for r in range(num_rounds):
        progress = 1 - math.exp(-4 * (r + 1) / num_rounds)
        for p in range(num_peers):
            sent[p] += 740_000 * 4 * sum(p in pair for pair in kept)
        turn = r // inner_steps
        events.append(
            {
                "event": "round",
                "time": time + 0.4 * r,
                "round": r,
                "outer_round": turn // max(1, len(blocks)),
                "block": turn % max(1, len(blocks)),
                "inner_step": r % inner_steps,
                "loss": [
                    2.8 - 2 * progress + 0.06 * p / num_peers + 0.09 * float(rng.normal()) for p in range(num_peers)
                ],
                "lr": 5e-5,
                "grad_norm": [1.0] * num_peers,
                "consensus_distance": (
                    0.002 * (1 + r % inner_steps) ** 0.5 * math.exp(0.2 * float(rng.normal()))
                    if num_peers > 1
                    else None
                ),
                "bytes_sent": list(sent),
                "epochs": [8 * (r + 1) / samples[p] for p in range(num_peers)],
                "wall_s": 0.4 * (r + 1),
            }
        )
        if (r + 1) % 40 == 0 and r + 1 < num_rounds:
            peers = [metrics(progress, True) for _ in range(num_peers)] if num_peers > 1 else None
            events.append(
                {"event": "eval", "time": time, "round": r + 1, "average_model": metrics(progress), "peers": peers}
            )
    final = {"before": metrics(0), "average_model": metrics(1), "peers": [metrics(1, True) for _ in range(num_peers)]}
    if num_peers > 1:
        events.append({"event": "agreement", "time": time, "hops": 4, "bytes_sent": [s + 12_600_000 for s in sent]})
    events.append(
        {"event": "end", "time": time, "metrics": final, "wall_s": 0.4 * num_rounds, "peak_memory_bytes": 734_003_200}
    )
    return events


def save(run_dir: Path, events: Events, tail: str = "") -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (run_dir / "events.jsonl").write_text(lines + tail, encoding="utf-8")
    return run_dir


class Page(HTMLParser):
    """What the tests ask of a page: balanced tags, ids, texts, every attribute that could load something."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.loads: list[str] = []
        self.classes: Counter[str] = Counter()
        self.points: list[dict[str, Any]] = []
        self.texts: dict[str, str] = {}
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = {name: value or "" for name, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.classes.update(values.get("class", "").split())
        self.loads += [v for k, v in values.items() if k in ("src", "href", "srcset", "action", "xlink:href")]
        assert not [name for name in values if name.startswith("on")], "event handlers belong to the script"
        if "data-points" in values:
            self.points.append(json.loads(values["data-points"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts[self.ids[-1] if self.ids else ""] = self.texts.get(self.ids[-1] if self.ids else "", "") + data


def report(run_dir: Path, events: Events, tail: str = "") -> Page:
    path = write_report(save(run_dir, events, tail))
    assert path == run_dir / "report.html"
    page = Page(path)
    assert set(SECTIONS) | {"summary"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(re.fullmatch(r"#[a-z]+", target) for target in page.loads), page.loads
    assert not re.findall(r"https?://|url\(|@import", page.source)
    return page


def test_shows_a_finished_run(tmp_path: Path) -> None:
    page = report(tmp_path, synthetic_events())
    summary = page.texts["summary"].replace(formatting.THIN, " ")
    for part in ("27.0 % → 88.0 %", "+61.0 points", "700 MiB", "1 min 36 s", "240"):
        assert part in summary
    assert "finished" in page.texts[""]
    assert page.tags["svg"] == 4 + 1 + 1 + len(BLOCKS) + 1, "four charts, loss of the held-out rows, graph, W, strips"
    assert page.classes["empty"] == 0
    assert "λ2 = 0.7430" in page.texts["graph"] and "0.2570" in page.texts["graph"]
    assert all(label in page.texts["data"] for label in LABELS)
    assert all(block in page.texts["blocks"] for block in BLOCKS)
    assert 'path = "tiny"' in page.texts["recipe"] and "[data.partition]" in page.texts["recipe"]
    assert "Tied embeddings are frozen" in page.texts["notes"] and "2.13.0" in page.texts["versions"]


def test_loss_chart_holds_every_peer_and_the_mean(tmp_path: Path) -> None:
    events = synthetic_events(num_peers=3, num_rounds=5)
    losses = [e["loss"] for e in events if e["event"] == "round"]
    chart = report(tmp_path, events).points[0]
    assert [row["name"] for row in chart["rows"]] == ["peer 0", "peer 1", "peer 2", "mean of peers"]
    assert chart["label"] == ["1", "2", "3", "4", "5"]
    for peer in range(3):
        assert chart["rows"][peer]["text"] == [formatting.number(row[peer]) for row in losses]
    assert chart["rows"][3]["text"] == [formatting.number(sum(row) / 3) for row in losses]


def test_traffic_ends_with_the_agreement(tmp_path: Path) -> None:
    events = synthetic_events(num_peers=2, num_rounds=4)
    agreed = next(e for e in events if e["event"] == "agreement")["bytes_sent"]
    traffic = report(tmp_path, events).points[-1]
    assert traffic["label"][-1] == "5"
    assert [row["text"][-1] for row in traffic["rows"][:2]] == [formatting.traffic(b) for b in agreed]


def test_summary_has_the_last_word_on_bytes(tmp_path: Path) -> None:
    events = synthetic_events(num_peers=2, num_rounds=4)
    (tmp_path / "summary.json").write_text(json.dumps({"bytes_sent_per_peer": [5_000, 5_000]}), encoding="utf-8")
    assert f"5{formatting.THIN}kB" in report(tmp_path, events).texts["summary"]
    (tmp_path / "summary.json").write_text('{"bytes', encoding="utf-8")
    page = report(tmp_path, events)
    assert "summary.json could not be read" in page.texts["notes"]
    assert f"5{formatting.THIN}kB" not in page.texts["summary"]


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    quote = "\"'><img src=x onerror=alert(2)>"
    events = synthetic_events(labels=(evil, quote, "\ud800 lone", "nul\x00"), blocks=(evil, quote))
    start = events[0]
    start["notes"].append(evil)
    start["versions"][evil] = quote
    start["config"]["model"]["path"] = quote
    start["config"]["algorithm"]["name"] = evil
    start["config"][evil] = {evil: evil}
    start["model"]["frozen"] = [evil]
    events[1]["average_model"] = {evil: 1.0, "accuracy": 0.3}
    page = report(tmp_path, events, tail="{\n")
    assert page.tags["script"] == 1 and page.tags["img"] == 0
    assert evil in page.texts["data"] and evil in page.texts["notes"] and quote in page.texts["blocks"]
    assert "1 warning" in page.texts[""]


def test_a_link_in_a_folder_that_came_from_anybody_is_not_written_through(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine", tmp_path / "run"
    mine.write_text("as it was")
    folder.mkdir()
    for name in ("report.html", "report.html.partial"):
        (folder / name).symlink_to(mine)
    report(folder, synthetic_events())
    assert mine.read_text() == "as it was" and not (folder / "report.html").is_symlink()


@pytest.mark.parametrize("huge", [1e308, 2**63, 10**400])
def test_numbers_that_nobody_measured_take_no_memory_and_end_no_command(huge: float, tmp_path: Path) -> None:
    """A folder may come from anybody: an edge to peer 2**63 would be a list as long, a loss of 1e308 no axis."""
    events = synthetic_events()
    events[0]["edges"] += [[0, huge], [huge, huge]]
    for event in events[2:4]:
        event |= {"loss": [huge] * 8, "consensus_distance": huge, "bytes_sent": [huge] * 8}
    page = report(tmp_path, events)
    assert page.tags["svg"]
    state = read_state(tmp_path)
    assert len(state.edges) == len(synthetic_events()[0]["edges"]) and status_lines(state) and fragments(state)


def test_a_run_in_progress(tmp_path: Path) -> None:
    events = synthetic_events()
    page = report(tmp_path / "started", events[:1])
    assert "0\u202f% of 240 rounds" in page.texts[""]
    assert "No round has been logged yet." in page.texts["loss"]
    assert "No evaluation yet." in page.texts["heldout"]
    page = report(
        tmp_path / "halfway",
        [e for e in events if e.get("round", 0) < 120 and e["event"] in ("start", "eval", "round")],
    )
    assert "50\u202f% of 240 rounds" in page.texts[""]
    assert "before → so far" in page.texts["summary"]
    assert "known at the end" in page.texts["summary"]


def test_a_half_written_last_line_is_left_out_silently(tmp_path: Path) -> None:
    events = synthetic_events(num_peers=2, num_rounds=6)[:6]
    whole = report(tmp_path, events)
    assert report(tmp_path, events, tail='{"event": "round", "roun').source == whole.source


def test_a_broken_line_in_the_middle_is_reported(tmp_path: Path) -> None:
    page = report(
        tmp_path, synthetic_events(num_peers=2, num_rounds=6)[:6], tail='{"event": "rou\n[1]\n{"event": "checkpoint"}\n'
    )
    assert "2 unreadable lines of events.jsonl left out" in page.texts["notes"]


def test_a_run_that_went_on_says_where_and_is_not_finished(tmp_path: Path) -> None:
    events = [e for e in synthetic_events(num_peers=2, num_rounds=8) if e["event"] in ("start", "round")]
    run = read_run(save(tmp_path, [*events[:5], {"event": "resume", "time": 0.0, "round": 4}, *events[5:6]]))
    assert [r.round for r in run.rounds] == [0, 1, 2, 3, 4]
    assert run.resumes == (4,) and not run.finished


def test_one_peer_has_no_graph(tmp_path: Path) -> None:
    page = report(tmp_path, synthetic_events(num_peers=1, num_rounds=20))
    assert "One model: no graph." in page.texts["graph"]
    assert "nothing to disagree about" in page.texts["consensus"]
    assert page.classes["graph"] == 0 and page.points[0]["rows"][0]["name"] == "model"


def test_pooled_training_has_one_model_on_the_data_of_many(tmp_path: Path) -> None:
    events = synthetic_events(num_peers=4, num_rounds=6)
    for event in events:
        for key in ("loss", "bytes_sent", "epochs", "grad_norm"):
            event[key] = event[key][:1] if key in event else []
    events[0] |= {"edges": [], "weights": [[1.0]], "lambda2": 0.0}
    page = report(tmp_path, events)
    assert "One model: no graph." in page.texts["graph"]
    assert "over 4 peers" in page.texts["data"]


def test_a_sites_page_names_no_peer_that_it_does_not_know(tmp_path: Path) -> None:
    """A site knows its own loss, bytes and data; the page of north is not one of three peers and their mean."""
    events = synthetic_events(num_peers=3, num_rounds=6)
    for event in events:
        for key in ("loss", "bytes_sent", "epochs", "grad_norm"):
            event |= {key: [None, event[key][1], None]} if key in event else {}
        event |= {"consensus_distance": None} if "consensus_distance" in event else {}
    events[0] |= {"peers": [events[0]["peers"][1] | {"peer": 1}], "lambda2": 5.55e-17}
    *_, end = events
    end["metrics"]["peers"] = [{}, end["metrics"]["peers"][1], {}]
    save(tmp_path, events)
    agreement = {"with": ["north"], "without": ["south"], "unheard": [], "is_one": True}
    (tmp_path / "summary.json").write_text(json.dumps({"agreement": agreement}))
    page = report(tmp_path, events)
    names = {row["name"] for points in page.points for row in points["rows"]}
    assert names == {"this site", "before agreement", "this site's model"}
    assert "of peers" not in page.texts["heldout"] and "before agreement" in page.texts["heldout"]
    assert "A site sees only its own model" in page.texts["consensus"]
    assert "Partition" not in page.texts["data"] and "λ2 = 0," in page.texts["graph"]
    assert "also that of: north; not that of: south" in page.texts["notes"]
    (tmp_path / "summary.json").unlink()  # the run's own report is written before it
    end["agreement"] = agreement | {"is_one": False}
    page = report(tmp_path, events)
    assert "agreed with: north; without: south; but they do not all hold one model" in page.texts["notes"]


def test_many_peers_and_rounds_stay_readable(tmp_path: Path) -> None:
    events = synthetic_events(num_peers=64, num_rounds=450, labels=[f"intent_{i}" for i in range(30)])
    page = report(tmp_path, events)
    loss = page.points[0]
    assert [row["name"] for row in loss["rows"]] == ["mean of peers", "range of 64 peers"]
    assert len(loss["at"]) <= series.MAX_POINTS and loss["at"] == sorted(loss["at"])
    assert "19 other classes" in page.texts["data"]
    assert page.classes["band"] >= 2 and page.classes["faint"] == 0
    assert len(page.source) < 1_000_000


def test_one_round_is_seen_and_long_classes_are_told_apart(tmp_path: Path) -> None:
    long = [f"{'a class with a long name ' * 3}{i}" for i in range(3)]
    events = synthetic_events(num_peers=2, num_rounds=1, labels=long)
    page = report(tmp_path, [e for e in events if e["event"] in ("start", "round")])
    assert page.classes["dots"] >= 3 * 2, "two peers and their mean, of loss and of traffic"
    assert all(f"long name {i}</bdi>" in page.source for i in range(3))


def test_a_hub_stands_in_the_middle(tmp_path: Path) -> None:
    events = synthetic_events(num_peers=3, num_rounds=2)
    events[0]["edges"] = [[0, 3], [1, 3], [2, 3]]
    page = report(tmp_path, events)
    assert "hub" in page.texts["graph"] and 'cx="200.0" cy="200.0"' in page.source


def test_a_weight_is_written_in_the_colour_that_can_be_read_on_its_square() -> None:
    shown = heat_map([[1.0, 0.6], [0.75, 0.2]])
    assert re.findall(r"<text( class=\"strong\")?[^>]*>([0-9.]+)", shown) == [
        (' class="strong"', "1.00"), ("", "0.60"), (' class="strong"', "0.75"), ("", "0.20"),
    ]  # fmt: skip


def test_unknown_values_are_gaps(tmp_path: Path) -> None:
    events = synthetic_events(num_peers=2, num_rounds=5)
    rounds = [e for e in events if e["event"] == "round"]
    rounds[1]["loss"] = [None, 1.0]
    rounds[2]["loss"] = [float("nan"), float("inf")]
    rounds[3]["loss"] = [None]
    rounds[4]["consensus_distance"] = None
    rounds[0]["consensus_distance"] = 0.0
    first, second, mean = report(tmp_path, events).points[0]["rows"]
    assert first["text"][1:4] == [formatting.NONE] * 3
    assert second["text"][1:4] == ["1.000", formatting.NONE, formatting.NONE]
    assert mean["text"][1] == "1.000"


@pytest.mark.parametrize("content", [None, "", "{}\n", '{"event": "round", "round": 0}\n', "not json\n"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "events.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match="got no run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(0, 1e6),
)
def test_linear_ticks_span_the_values(low: float, span: float) -> None:
    axis = charts.linear_axis(low, low + span)
    slack = 1e-6 * (axis.high - axis.low)
    assert axis.low <= low + slack and axis.high >= low + span - slack
    assert 2 <= len(axis.ticks) <= 9
    assert list(axis.ticks) == sorted(set(axis.ticks))


@given(low=st.floats(1e-12, 1e3), factor=st.floats(1, 1e9))
@example(low=0.99999, factor=1)
def test_log_ticks_span_the_values(low: float, factor: float) -> None:
    axis = charts.log_axis(low, low * factor)
    assert -1e-3 <= axis.place(low) <= axis.place(low * factor) <= 1 + 1e-3
    assert 2 <= len(axis.ticks) <= 9


@given(values=st.lists(st.none() | st.floats(-10, 10), max_size=300), window=st.sampled_from([1, 3, 9]))
def test_smoothing_keeps_gaps_and_the_range(values: list[float | None], window: int) -> None:
    smoothed = series.smooth(values, window)
    assert [v is None for v in smoothed] == [v is None for v in values]
    known = [v for v in values if v is not None]
    assert all(min(known) - 1e-9 <= v <= max(known) + 1e-9 for v in smoothed if v is not None)
    size = series.bin_size(len(values), 50)
    assert len(series.downsample(values, size)) <= 50


def test_numbers_read_well() -> None:
    thin = formatting.THIN
    assert [formatting.number(v) for v in (0.31493, 86.213, 1234567.0, 0.0, 2.5e-7)] == [
        "0.3149", "86.21", f"1{thin}234{thin}567", "0", f"2.50e{formatting.MINUS}7",
    ]  # fmt: skip
    assert [formatting.traffic(v) for v in (0, 999, 999_999, 1.06e9)] == [
        f"0{thin}B",
        f"999{thin}B",
        f"1{thin}MB",
        f"1.06{thin}GB",
    ]
    assert [formatting.duration(v) for v in (1.41, 181, 3960)] == [
        f"1.41{thin}s",
        f"3{thin}min 1{thin}s",
        f"1{thin}h 6{thin}min",
    ]
    axis = charts.linear_axis(0.5, 3.0)
    assert charts.tick_texts(axis, formatting.number) == ["0.5", "1.0", "1.5", "2.0", "2.5", "3.0"]
    assert charts.tick_texts(charts.linear_axis(0.2, 1.0), formatting.percent)[-1] == f"100{thin}%"


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no browser: looked for chromium, chromium-browser and google-chrome")


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
    quiet = ("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr")
    command = [chromium(), *flags, *quiet, f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, timeout=300)


def pixels(path: Path) -> tuple[int, int, bytes]:
    """Width, height and image data, filters included, of a PNG."""
    raw = path.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])

    def chunks() -> Iterator[bytes]:
        at = 8
        while at < len(raw):
            (length,) = struct.unpack(">I", raw[at : at + 4])
            if raw[at + 4 : at + 8] == b"IDAT":
                yield raw[at + 8 : at + 8 + length]
            at += 12 + length

    return width, height, zlib.decompress(b"".join(chunks()))


def test_a_browser_shows_it_without_complaint(tmp_path: Path) -> None:
    events = synthetic_events(labels=("<script>document.title = 'owned'</script>", "Sports"))
    page = write_report(save(tmp_path / "run", events))
    picture = tmp_path / "picture.png"
    shot = browse(page, tmp_path / "profile", "--window-size=1280,2600", f"--screenshot={picture}")
    assert "CONSOLE" not in shot.stderr
    width, height, data = pixels(picture)
    assert (width, height) == (1280, 2600)
    assert len(zlib.compress(data)) > 60_000 and len(set(data)) > 100, (
        "an empty page has few shades and compresses to little"
    )

    dumped = browse(page, tmp_path / "profile", "--dump-dom")
    assert "CONSOLE" not in dumped.stderr
    for section in SECTIONS:
        assert f'id="{section}"' in dumped.stdout
    assert "<title>deca, 8 peers · peertune</title>" in dumped.stdout
    assert dumped.stdout.count("<script>") == 1


def test_who_never_agrees_is_told_by_the_peers_own_models(tmp_path: Path, micro_model: Path) -> None:
    """Nobody holds the average of models that were trained apart, and no W mixed them."""
    config = recipe(tmp_path, micro_model, algorithm={"name": "local", "outer_rounds": 2})
    summary = run(config)
    page = (tmp_path / "out" / "report.html").read_text()
    own = sum(peer["accuracy"] for peer in summary["metrics"]["peers"]) / 4
    assert "the peers' own, mean" in page and f"{own * 100:.1f}" in page
    assert summary["lambda2"] is None and "a round of mixing shrinks" not in page
    assert "4 peers" in page
