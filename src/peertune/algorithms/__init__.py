"""The methods, one file each. A new one is a class here and a line in `ALGORITHMS`."""

from peertune.algorithms.base import Algorithm
from peertune.algorithms.deca import Deca
from peertune.algorithms.dpsgd import Dpsgd
from peertune.algorithms.local import Local
from peertune.algorithms.pooled import Pooled
from peertune.config import AlgorithmConfig

__all__ = ["ALGORITHMS", "METHODS", "Algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {"deca": Deca, "local": Local, "pooled": Pooled, "dpsgd": Dpsgd}
METHODS: dict[str, type[AlgorithmConfig]] = {name: method.Config for name, method in ALGORITHMS.items()}
