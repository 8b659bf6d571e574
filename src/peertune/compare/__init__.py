"""Methods side by side: the same data, partition, graph, base and budget, differences tested in pairs over seeds.

Reading order: options, contestants, budget, grid, cells, stats, table, charts, page, comparison.
"""

from peertune.compare.comparison import Comparison, compare
from peertune.compare.grid import GridProgress
from peertune.compare.options import Options

__all__ = ["Comparison", "GridProgress", "Options", "compare"]
