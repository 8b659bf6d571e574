"""The way of the data: `load_table` -> `partition` over the peers -> `render` into samples -> `Batches`.

Reading order: load, partition, render (with chat and tokens below it), batches. `stdlib` is the demo's corpus.
"""

from peertune.data.batches import Batch, Batches, UnionBatches, collate
from peertune.data.chat import plain_template
from peertune.data.load import Table, load_table
from peertune.data.partition import describe_partition, partition
from peertune.data.render import Rendered, Sample, find_labels, label_tokens, render

__all__ = [
    "Batch",
    "Batches",
    "Rendered",
    "Sample",
    "Table",
    "UnionBatches",
    "collate",
    "describe_partition",
    "find_labels",
    "label_tokens",
    "load_table",
    "partition",
    "plain_template",
    "render",
]
