"""A run's recipe: frozen sections, read from TOML plus `section.key=value` overrides, checked where they are built.

Only what a run *is* lives here. A method's own keys are declared in its file under `algorithms/`, by subclassing
`AlgorithmConfig`; `load_recipe` is handed the table of methods, so that this module knows none of them.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from peertune.errors import ConfigError

MAX_DEPTH = 20
"""Levels of a TOML file at most; ours have four."""
Sources = str | list[str]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
LearningRate = Annotated[float, Field(ge=1e-30, le=1e30)]
"""Beyond, a step is none in float32, or more than it can hold."""
Epsilon = Annotated[float, Field(ge=1e-30, le=1e15)]
"""Keeps a division from one by zero: float32 holds it, and its square is no infinity."""
Decay = Annotated[float, Field(ge=0, lt=1)]
Decays = Annotated[tuple[Decay, Decay], Field(strict=False)]
"""Two decay rates of moving averages; TOML has lists, not tuples."""


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversions (an integer may stand for a float)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunSection(Section):
    seed: NonNegative = 0
    """Seed of everything random: partition, graph, batches. `data.partition.seed` and `topology.seed` override it."""
    num_peers: Positive = 8
    """Number of peers N. Default: DECA's published setting."""
    out: Annotated[str, Field(min_length=1)] = "runs/latest"
    """Folder of the run; it must not hold another run."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda" or "cuda:0"."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads for PyTorch; 0 keeps PyTorch's choice. Results are bitwise repeatable for one thread count."""
    ranks_per_peer: Positive = 1
    """Processes of torchrun that are one peer: they split its parameters (FSDP2) and its batches among them. Needs
    PyTorch 2.13; tried on CPUs only."""
    parallel_peers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Simulated peers that train at the same time on a CPU, a thread each; results are those of threads = 1."""
    batched_peers: Annotated[int, Field(ge=1, le=1024)] = 1
    """Simulated peers whose local steps are one batched call, where LoRA on a frozen base is trained: faster for small
    batches, and weights differ by rounding from those of one peer after the other."""
    checkpoint_every: NonNegative = 0
    """Rounds between checkpoints; 0: at the end of each block's turn."""
    log_every: Positive = 1
    """Rounds between lines in events.jsonl and measurements of the consensus distance."""


class ModelSection(Section):
    path: str = "tiny"
    """A local folder, a hub name, or "tiny": the 3 MB base that ships with the package."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the weights in `path`, or pre-train from random ones of the shape that its config.json says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the weights are held in; with bfloat16 the active block has float32 masters, which are what is sent."""
    quantization: Literal["none", "4bit"] = "none"
    """Hold the base's linear layers in 4 bits (NF4), under a method that trains an adapter; needs bitsandbytes."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernels; "auto" is transformers' choice, but on a CPU batches run without padding, and in bfloat16
    sequences of up to 512 tokens have a kernel of our own."""
    max_length: Annotated[int, Field(ge=8)] = 256
    """Longest sequence, tokens; longer text is cut or packed."""
    trust_remote_code: bool = False
    """Whether code that comes with a hub model may run."""
    train_embeddings: Literal["untied", "all", "none"] = "untied"
    """Train token embeddings and output head: only where they are two tensors (default), always, or never."""
    activation_budget_mb: NonNegative = 0
    """Keep saved activations below this many megabytes by recomputing layers from the active block up; 0: keep all."""
    prefix_cache: bool = False
    """Remember, in host memory, each sample's hidden state below the active block; batches are padded to max_length."""
    compile: bool = False
    """Compile each transformer layer with torch.compile."""


class PartitionSection(Section):
    kind: Literal["iid", "dirichlet", "quantity", "column", "files"] = "dirichlet"
    """How the training rows are dealt to the peers. Default: DECA's published setting."""
    alpha: Annotated[float, Field(gt=0)] = 0.25
    """Dirichlet concentration (dirichlet, quantity): smaller is more skewed. Default: DECA's."""
    column: str = ""
    """Field that `column` splits by and `dirichlet` skews; empty: the label, or "client" where there is no label."""
    min_size: Positive = 1
    """Fewest rows a peer may hold."""
    seed: NonNegative | None = None
    """Overrides run.seed for the partition."""


class DataSection(Section):
    train: Sources = "stdlib"
    """Path, list of paths, Hugging Face data set name, or "stdlib": source text of Python's own standard library."""
    test: Sources = ""
    """Held-out rows, likewise; empty: nothing is evaluated. Left out together with train: "stdlib-test"."""
    task: Literal["text", "classification", "instruction", "chat"] = "text"
    """What a row is, and what of it is predicted: a text (all of it), a text with a label (the label), an instruction
    (its answer), a conversation (what the assistant says)."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 8
    """Sequences in a peer's batch."""
    max_samples: NonNegative = 0
    """Rows each peer keeps at most, chosen by the partition's seed; 0: all."""
    validation_rows: NonNegative = 0
    """Rows taken out of `train` before it is dealt: never trained on. 0: none."""
    validation_seed: NonNegative | None = None
    """Decides which rows those are; none: the partition's seed does."""
    text_field: str = "text"
    """Field of the text (text, classification)."""
    text_b_field: str = "text_b"
    """Field of a pair's second text; used where a row has it (classification)."""
    label_field: str = "label"
    """Field of the label (classification)."""
    instruction_field: str = "instruction"
    """Field of what is asked (instruction)."""
    input_field: str = "input"
    """Field of what the instruction is about; put below it where a row has it (instruction)."""
    output_field: str = "output"
    """Field of the answer (instruction)."""
    messages_field: str = "messages"
    """Field of the messages, a list of objects with a role and content (chat)."""
    tools_field: str = "tools"
    """Field of the functions offered, a list of their schemas; used where a row has it (chat)."""
    partition: PartitionSection = PartitionSection()


class TopologySection(Section):
    kind: Literal["ring", "complete", "erdos_renyi", "star", "torus", "exponential", "bipartite", "edges", "matrix"] = (
        "erdos_renyi"
    )
    """The graph. Default: DECA's."""
    p: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Chance of an edge (erdos_renyi). Not in the paper as we have it: ours."""
    edges: list[list[int]] = []
    """Pairs of peers, counted from 0 (edges)."""
    matrix: list[list[float]] = []
    """W itself, a row for each peer: the weights it gives to every peer's message (matrix)."""
    weights: Literal["metropolis", "laplacian", "uniform", "samples"] = "metropolis"
    """How the mixing matrix W is made of the graph."""
    seed: NonNegative | None = None
    """Overrides run.seed for the graph."""


class AlgorithmConfig(Section):
    """Keys that every method has. A method adds its own by subclassing."""

    name: str = "deca"
    """The method; an unknown name is answered with all known ones."""
    lr: LearningRate = 5e-5
    """Peak learning rate. Default: DECA's."""
    warmup_steps: NonNegative = 0
    """Local steps over which the rate rises linearly from 0; those of rounds that a peer sits out count too."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after warm-up: stays, or falls to 0, where it would be one local step after the last."""
    grad_accumulation: Positive = 1
    """Batches over whose target tokens, all alike, a local step averages its gradient."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only (never on norms and biases)."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 0.0
    """Clip the trained block's gradient to this L2 norm; 0: no clipping."""
    adapter: Literal["none", "lora", "bottleneck", "prompt", "prefix"] = "none"
    """What is trained: the model's own parameters, or an adapter on the frozen base. Methods of LoRA's two factors take
    LoRA only, the others any."""
    rank: Positive = 16
    """Rank r of LoRA's factors. Default: Dec-LoRA's."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA's product is scaled by lora_alpha / rank. Dec-LoRA does not state it: ours."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before LoRA's first factor. Not stated by Dec-LoRA: none."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers that get LoRA: names as peft takes them, or "all-linear": all but the output head."""
    bottleneck_size: Positive = 16
    """Width of a bottleneck adapter."""
    num_virtual_tokens: Positive = 8
    """Soft prompt tokens, or positions of a prefix."""
    local_modules: list[str] = []
    """Personal parts: trained parameters whose name holds one of these texts never leave their peer."""

    def num_steps(self, num_blocks: int) -> int:
        """Local steps of a peer in a whole run, for a model of `num_blocks` blocks."""
        raise NotImplementedError(f"{self.name}: a method's keys say how many local steps they make")

    def share_at_work(self, num_peers: int) -> float:
        """Of the local steps that `num_steps` counts, the part that a peer takes on average over peers and rounds."""
        return 1.0

    def with_steps(self, steps: int, num_blocks: int) -> Self:
        """The same method with as near to `steps` local steps as its schedule allows.

        Never more than `steps`, but for the shortest run that the schedule knows.
        """
        raise NotImplementedError(f"{self.name}: a method's keys say how they fit a number of local steps")


class EvalSection(Section):
    every: NonNegative = 0
    """Rounds between evaluations of the average model; 0: only before and after, or as `points` says."""
    points: NonNegative = 0
    """At most so many evaluations of the average model, evenly over the run, where `every` is 0."""
    split: Literal["test", "validation"] = "test"
    """What is evaluated: the rows of data.test, or those that data.validation_rows keeps back from data.train."""
    max_samples: NonNegative = 1000
    """Held-out rows used at most; 0: all."""
    generate_samples: NonNegative = 0
    """Held-out rows answered by greedy generation (instruction, and chat rows with calls); 0: nothing is generated."""
    max_new_tokens: Positive = 128
    """Tokens of a generated answer at most."""
    choice_samples: NonNegative = 0
    """Chat rows with calls for which each function offered is scored by its likelihood; 0: none."""


class ExchangeSection(Section):
    """How the messages of a round travel, and what a receiver makes of them."""

    codec: Literal["float32", "bfloat16"] = "float32"
    """What the numbers of averaged messages are on their way: bfloat16, rounded at random, is half the bytes."""
    robust: Literal["none", "clip", "trimmed_mean"] = "none"
    """Their weighted mean, or one that members who send garbage cannot ruin: "clip" bounds how far each message moves
    it, "trimmed_mean" leaves out the extremes of each weight. Without a server, peers then do not agree in the end."""
    clip_factor: Annotated[float, Field(gt=0)] = 1.0
    """What clips, as a multiple of the median distance of a peer's neighbours to itself (clip)."""
    trim: Positive = 1
    """b: neighbours of each peer, or clients of the server, that may send garbage (trimmed_mean)."""


class LinkSection(Section):
    """The links that the simulated time supposes. No weight depends on them."""

    bandwidth_mbit: Annotated[float, Field(gt=0)] = 100.0
    """What a peer can send, megabits a second."""
    latency_ms: Annotated[float, Field(ge=0)] = 20.0
    """Time from a message's last byte sent to its arrival, milliseconds."""


class RunConfig(Section):
    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    topology: TopologySection = TopologySection()
    algorithm: SerializeAsAny[AlgorithmConfig] = AlgorithmConfig()
    eval: EvalSection = EvalSection()
    exchange: ExchangeSection = ExchangeSection()
    link: LinkSection = LinkSection()

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain data; `from_dict` reads it back."""
        return self.model_dump(mode="json")


Methods = Mapping[str, type[AlgorithmConfig]]
ONLY_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "model.train_embeddings": ("algorithm.adapter", ("none",)),
    "data.partition.alpha": ("data.partition.kind", ("dirichlet", "quantity")),
    "topology.p": ("topology.kind", ("erdos_renyi",)),
    "topology.edges": ("topology.kind", ("edges",)),
    "topology.matrix": ("topology.kind", ("matrix",)),
    "algorithm.rank": ("algorithm.adapter", ("lora",)),
    "algorithm.lora_alpha": ("algorithm.adapter", ("lora",)),
    "algorithm.lora_dropout": ("algorithm.adapter", ("lora",)),
    "algorithm.target_modules": ("algorithm.adapter", ("lora",)),
    "algorithm.bottleneck_size": ("algorithm.adapter", ("bottleneck",)),
    "algorithm.num_virtual_tokens": ("algorithm.adapter", ("prompt", "prefix")),
    "exchange.clip_factor": ("exchange.robust", ("clip",)),
    "exchange.trim": ("exchange.robust", ("trimmed_mean",)),
}
"""Keys that mean something only where another key has one of some values."""


def load_recipe(path: str | Path | None, overrides: Sequence[str], methods: Methods) -> tuple[RunConfig, list[str]]:
    """Read a recipe.

    Args:
        path: TOML file; None stands for an empty one.
        overrides: `section.key=value` texts; the value is TOML, a bare word a string. They win over the file.
        methods: name -> the class of its [algorithm] keys.
    Returns:
        The recipe, and a line for each key that nothing uses: of another method, or of a choice not made.
    Raises:
        ConfigError: the file cannot be read, a key does not exist, or a value has the wrong type or is impossible.
    """
    tree = _read_toml(Path(path)) if path is not None else {}
    for text in overrides:
        apply_override(tree, text)
    return from_dict(tree, methods)


def from_dict(tree: Mapping[str, Any], methods: Methods) -> tuple[RunConfig, list[str]]:
    """Check a recipe given as nested dicts. Returns and raises as `load_recipe`."""
    raw = tree.get("algorithm", {})
    raw = {**raw} if isinstance(raw, Mapping) else raw
    notes: list[str] = []
    method: type[AlgorithmConfig] = AlgorithmConfig
    if isinstance(raw, dict):
        name = raw.get("name", "deca")
        if not isinstance(name, str) or name not in methods:
            raise ConfigError(
                f"algorithm.name: got {name!r}, expected one of {', '.join(methods)}{_nearest(str(name), methods)}"
            )
        method = methods[name]
        others = {key for m in methods.values() for key in m.model_fields} - set(method.model_fields)
        for key in sorted(others & raw.keys()):
            users = ", ".join(n for n, m in methods.items() if key in m.model_fields)
            notes.append(f"algorithm.{key} is not used by {name} (it is a key of {users})")
            del raw[key]
    try:
        algorithm = method.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_explain(error, ("algorithm",), method)) from None
    try:
        config = RunConfig.model_validate({**tree, "algorithm": algorithm})
    except ValidationError as error:
        raise ConfigError(_explain(error, (), RunConfig)) from None
    if "train" not in config.data.model_fields_set and "test" not in config.data.model_fields_set:
        config = config.model_copy(update={"data": config.data.model_copy(update={"test": "stdlib-test"})})
    return config, notes + _unused(config)


def _unused(config: RunConfig) -> list[str]:
    """A line for each key of `ONLY_WITH` that is set although the other key is not."""
    values = flatten(config.to_dict())
    defaults = flatten(RunConfig(algorithm=type(config.algorithm)()).to_dict())
    return [
        f"{key} is not used with {other} = {values[other]!r} (but with {', '.join(map(repr, users))})"
        for key, (other, users) in ONLY_WITH.items()
        if values[key] != defaults[key] and values[other] not in users
    ]


def keys_of(section: type[Section], prefix: str = "") -> list[str]:
    """All dotted keys below a section, in order."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += keys_of(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def parse_toml(text: str) -> dict[str, Any]:
    """What TOML says that may come from anybody.

    Raises:
        ValueError: it is none, holds a number that Python does not read, or is nested as nothing of ours is.
    """
    try:
        tree = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        level = [child for child in level if isinstance(child, dict | list)]
    if level:
        raise ValueError("nested too deeply")
    return tree


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such recipe; expected a TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def apply_override(tree: dict[str, Any], text: str) -> None:
    """Set a key of nested dicts from `section.key=value`. Raises ConfigError."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"--set {text!r}: expected section.key=value, such as algorithm.lr=1e-4")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")
        if list(parsed) != ["value"]:
            raise ConfigError(f"--set {text!r}: expected one value")
        item: Any = parsed["value"]
    except tomllib.TOMLDecodeError:
        item = value.strip()
    node = tree
    for part in parts[:-1]:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {text!r}: {part!r} is a value, not a section")
        node = child
    node[parts[-1]] = item


def _explain(error: ValidationError, prefix: tuple[str, ...], section: type[Section]) -> str:
    """One line for the first thing that is wrong: key, got, expected, nearest key."""
    problem = error.errors()[0]
    path = [str(p) for p in (*prefix, *problem["loc"]) if not _is_branch(str(p))]
    key, got = ".".join(path), json.dumps(problem["input"], default=str)
    if len(got) > 80:
        got = got[:77] + "..."
    if problem["type"] == "extra_forbidden":
        known = [f"algorithm.{k}" for k in section.model_fields] if prefix else keys_of(section)
        siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
        others = f"[{key.rpartition('.')[0]}] has {', '.join(siblings)}" if siblings else ""
        others = others or f"the sections are {', '.join(section.model_fields)}"
        return f"{key}: no such key (got {got}){_nearest(key, known)}; {others}".replace("?;", "?")
    if problem["type"] == "literal_error":
        choices = str(problem["ctx"]["expected"])
        words = choices.replace("'", "").replace(" or ", ", ").split(", ")
        return f"{key}: got {got}, expected {choices}{_nearest(str(problem['input']), words)}"
    return f"{key}: got {got}, expected {_expected(problem)}"


def _is_branch(part: str) -> bool:
    """Whether a part of a pydantic location names a branch of a union, not a key."""
    return part in {"str", "int", "float", "none"} or part.startswith(("list[", "constrained-"))


def _expected(problem: Any) -> str:
    message = str(problem["msg"]).replace("Input should be ", "")
    brief = re.sub(r"\d[\d.]{9,}", lambda digits: f"{float(digits[0]):g}", message)  # pydantic writes all zeros out
    return brief.removeprefix("a valid ")


def _nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known key with the same last part, else at the one spelled most alike."""
    known = list(known)
    close = [k for k in known if "." in k and k.rpartition(".")[2] == word.rpartition(".")[2]]
    close = close or difflib.get_close_matches(word, known, 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""
