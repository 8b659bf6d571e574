"""What a run is: the frozen sections of a recipe, each checked where it is built. `recipe` reads them.

A method's own keys are declared in its file under `algorithms/`, by subclassing `AlgorithmConfig`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, StringConstraints, field_validator
from pydantic_core import PydanticCustomError

Sources = str | list[str]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(ge=1, le=65536)]
"""Of an adapter's inner layer; beyond, no memory holds it."""
LearningRate = Annotated[float, Field(ge=1e-30, le=1e30)]
"""Beyond, a step is none in float32, or more than it can hold."""
Epsilon = Annotated[float, Field(ge=1e-30, le=1e15)]
"""Keeps a division from one by zero: float32 holds it, and its square is no infinity."""
Decay = Annotated[float, Field(ge=0, lt=1)]
Decays = Annotated[tuple[Decay, Decay], Field(strict=False)]
"""Two decay rates of moving averages; TOML has lists, not tuples."""
TrainEmbeddings = Literal["untied", "all", "none"]
Task = Literal["text", "classification", "instruction", "chat"]
Adapter = Literal["none", "lora", "bottleneck", "prompt", "prefix"]


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
    """Rounds between checkpoints; 0: at the end of each block's turn, or ten times a run of a method without blocks."""
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
    """Whether code that comes with the base may run."""
    train_embeddings: TrainEmbeddings = "untied"
    """Train token embeddings and output head: only where they are two tensors (default), always, or never."""
    activation_budget_mb: NonNegative = 0
    """Keep saved activations below this many megabytes by recomputing layers from the active block up; 0: keep all."""
    prefix_cache: bool = False
    """Remember, in host memory, each sample's hidden state below the active block; batches are padded to max_length."""
    compile: bool = False
    """Compile each transformer layer with torch.compile."""


class PartitionSection(Section):
    kind: Literal["iid", "dirichlet", "quantity", "column", "files"] = "dirichlet"
    """How the training rows are dealt to the peers: evenly; each class, or the sizes alone, by Dirichlet draws; each
    value of a field, or each file of data.train, whole to one peer. Default: DECA's published setting."""
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
    """Path, list of paths, Hugging Face data set org/name[[:config]:split], or "stdlib": source text of Python's own
    standard library."""
    test: Sources = ""
    """Held-out rows, likewise; empty: nothing is evaluated. Left out together with train: "stdlib-test"."""
    task: Task = "text"
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
    labels: list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]] = []
    """Names of the classes, in the order of their numbers (classification); empty: the rows' labels, sorted. Sites,
    each of which sees its own rows only, know of each other's classes by it."""
    instruction_field: str = "instruction"
    """Field of what is asked (instruction)."""
    input_field: str = "input"
    """Field of what the instruction is about; put below it where a row has it (instruction)."""
    output_field: str = "output"
    """Field of the answer (instruction)."""
    messages_field: str = "messages"
    """Field of the messages, a list of objects with a role and content, or with from and value as ShareGPT's (chat)."""
    system_field: str = "system"
    """Field of a system turn's text that is not among the messages; used where a row has it (chat). Empty: none, as
    where a field of that name says something else."""
    tools_field: str = "tools"
    """Field of the functions offered, a list of their schemas; used where a row has it (chat)."""
    partition: PartitionSection = PartitionSection()

    @field_validator("labels")
    @classmethod
    def _are_classes(cls, labels: list[str]) -> list[str]:
        if len(labels) == 1 or len(set(labels)) < len(labels):
            raise PydanticCustomError("classes", "two names or more, all different, or none")
        return labels


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
    adapter: Adapter = "none"
    """What is trained: the model's own parameters, or an adapter on the frozen base. Methods of LoRA's two factors take
    LoRA only, the others any."""
    rank: Width = 16
    """Rank r of LoRA's factors. Default: Dec-LoRA's."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """LoRA's product is scaled by lora_alpha / rank. Dec-LoRA does not state it: ours."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before LoRA's first factor. Not stated by Dec-LoRA: none."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers that get LoRA: names as peft takes them, or "all-linear": all but the output head."""
    bottleneck_size: Width = 16
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
