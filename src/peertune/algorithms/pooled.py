"""All data in one place: the bound that no method which keeps data apart is expected to pass.

One model; each step's batch is the union of the N peers' batches of that step; the same block-wise Adam, the same
number of steps. One peer of DECA without moment correction, which is BAdam. `layers_per_block = 0` makes it AdamW.
"""

from peertune.algorithms.local import Local


class Pooled(Local):
    pools_data = True
