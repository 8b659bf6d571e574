"""The way of the data: `load_table` -> `partition` over the peers -> `render` into samples -> `Batches`.

Reading order: load, partition, render (with chat and tokens below it), batches. `stdlib` is the demo's corpus.
"""
