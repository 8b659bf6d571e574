"""The Flower side of `simulate.py`: FedAvg on LoRA adapters in Flower's simulation engine, on Ray.

    python _flower.py SPEC.json

Runs in an interpreter that has flwr[simulation], torch, transformers and peft, and needs nothing of peertune:
`simulate.py` writes what is to be done to SPEC.json, and the samples, batches and first adapter to an .npz beside it.
The last line of the output is one JSON object.

As good to Flower as it allows: one single-threaded actor a core, all of them warm after the first round; the model is
loaded once an actor and stays there; only adapters travel, as NumPy arrays; the server holds no model; no evaluation.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

client = ClientApp()


class Workplace:
    """What an actor keeps between clients: the base model with an adapter on it, and all clients' data."""

    def __init__(self, spec_path: str) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.torch = torch
        self.spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
        self.data = dict(np.load(self.spec["arrays"]))
        base = AutoModelForCausalLM.from_pretrained(self.spec["model"], dtype=self.spec["dtype"])
        base.config.use_cache = False
        lora = LoraConfig(
            r=self.spec["rank"],
            lora_alpha=self.spec["lora_alpha"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.model = get_peft_model(base, lora).train()
        self.adapter = [p for p in self.model.parameters() if p.requires_grad]

    def fit(self, index: int, round: int, adapter: list[np.ndarray]) -> tuple[list[np.ndarray], float]:
        """A client's local steps of a round (from 0): from the global adapter to its own, and the mean loss."""
        torch, steps = self.torch, self.spec["local_steps"]
        with torch.no_grad():
            for parameter, value in zip(self.adapter, adapter, strict=True):
                parameter.copy_(torch.from_numpy(value))
        optimizer = torch.optim.AdamW(self.adapter, lr=self.spec["lr"], weight_decay=0.0, fused=True)
        total = 0.0
        for draw in self.data["draws"][index, round * steps : (round + 1) * steps]:
            labels = torch.from_numpy(self.data["samples"][draw])
            # What fills up a sequence comes after it, where causal attention does not look.
            loss = self.model(input_ids=labels.clamp(min=0), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
        return [p.detach().numpy() for p in self.adapter], total / steps


@functools.cache
def workplace(spec_path: str) -> Workplace:
    return Workplace(spec_path)


@client.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    place = workplace(str(config["spec"]))
    index = int(context.node_config["partition-id"])
    started = time.perf_counter()
    adapter = message.content["arrays"].to_numpy_ndarrays()
    arrays, loss = place.fit(index, int(config["server-round"]) - 1, adapter)
    metrics = {
        "loss": loss,
        "fit_s": time.perf_counter() - started,
        "num-examples": int(place.data["num_samples"][index]),
    }
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


class TimedFedAvg(FedAvg):
    """Notes when each round's average is there."""

    def __init__(self, num_clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=num_clients, min_available_nodes=num_clients)
        self.num_clients = num_clients
        self.round_ends: list[float] = []
        self.losses: list[float] = []
        self.fit_s: list[float] = []

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        failed = [reply.error.reason for reply in replies if reply.has_error()]
        if failed or len(replies) != self.num_clients:
            raise RuntimeError(
                f"round {server_round}: got {len(replies) - len(failed)} of {self.num_clients} clients; {failed[:1]}"
            )
        average = super().aggregate_train(server_round, replies)
        self.round_ends.append(time.monotonic())
        # Plain means, as peertune's log has them; Flower's own are weighted by the clients' samples.
        reported = [reply.content["metrics"] for reply in replies]
        self.losses.append(float(np.mean([metrics["loss"] for metrics in reported])))
        self.fit_s.append(float(np.mean([metrics["fit_s"] for metrics in reported])))
        return average


def main(spec_path: str) -> None:
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    strategy = TimedFedAvg(spec["clients"])
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        with np.load(spec["arrays"]) as arrays:
            first = [arrays[f"adapter{i}"] for i in range(int(arrays["num_adapter"]))]
        strategy.start(
            grid,
            initial_arrays=ArrayRecord(first),
            num_rounds=spec["rounds"],
            train_config=ConfigRecord({"spec": spec_path}),
        )

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as scratch:
        run_simulation(
            server,
            client,
            num_supernodes=spec["clients"],
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0},
                "init_args": {
                    "num_cpus": spec["cores"],
                    "num_gpus": 0,
                    "include_dashboard": False,
                    "object_store_memory": 256 << 20,
                    "_temp_dir": scratch,
                },
            },
        )
    figures = {
        "round_ends": strategy.round_ends,
        "losses": strategy.losses,
        "fit_s": strategy.fit_s,
        "versions": {
            name: importlib.metadata.version(name) for name in ("flwr", "ray", "torch", "transformers", "peft")
        },
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    # Actors unpickle the app by the name of its module; that of a script is __main__, which theirs is not.
    import _flower

    _flower.main(sys.argv[1])
