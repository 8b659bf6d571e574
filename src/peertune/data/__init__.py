"""The way of the data: `load_table` -> `partition` over the peers -> `render` into samples -> `Batches`.

Reading order: load (with arrow below it), partition, render (with chat and tokens below it), batches. `stdlib` is the
demo's corpus.
"""
