"""The methods, one file each. A new one is a class here and a line in `ALGORITHMS`; or a package's own (`plugins`)."""

from collections.abc import Iterator

from peertune import plugins
from peertune.algorithms.alternating_lora import AlternatingLora
from peertune.algorithms.base import Algorithm
from peertune.algorithms.choco import Choco
from peertune.algorithms.dec_adapter import DecAdapter
from peertune.algorithms.dec_lora import DecLora
from peertune.algorithms.deca import Deca
from peertune.algorithms.decaf import Decaf
from peertune.algorithms.diloco import Diloco
from peertune.algorithms.ditto import Ditto
from peertune.algorithms.dlora_fa import DloraFa
from peertune.algorithms.dpsgd import Dpsgd
from peertune.algorithms.fedavg import Fedavg
from peertune.algorithms.gt import Gt
from peertune.algorithms.local import Local
from peertune.algorithms.noloco import Noloco
from peertune.algorithms.pooled import Pooled
from peertune.algorithms.qg import Qg
from peertune.algorithms.rw_lora import RwLora
from peertune.algorithms.scaffold import Scaffold
from peertune.config import AlgorithmConfig
from peertune.errors import ConfigError

__all__ = ["ALGORITHMS", "METHODS", "Algorithm"]

ALGORITHMS: dict[str, type[Algorithm]] = {
    "deca": Deca,
    "local": Local,
    "pooled": Pooled,
    "dpsgd": Dpsgd,
    "dec_lora": DecLora,
    "dec_adapter": DecAdapter,
    "decaf": Decaf,
    "dlora_fa": DloraFa,
    "alternating_lora": AlternatingLora,
    "rw_lora": RwLora,
    "gt": Gt,
    "qg": Qg,
    "choco": Choco,
    "fedavg": Fedavg,
    "scaffold": Scaffold,
    "ditto": Ditto,
    "diloco": Diloco,
    "noloco": Noloco,
}


def _of_other_packages() -> Iterator[tuple[str, type[Algorithm]]]:
    for name, point in plugins.found().items():
        method = plugins.load(point)
        if name in ALGORITHMS or not (isinstance(method, type) and issubclass(method, Algorithm)):
            expected = "another name" if name in ALGORITHMS else f"a subclass of {Algorithm.__qualname__}"
            raise ConfigError(f"entry point {name!r} of {plugins.GROUP}: got {point.value}, expected {expected}")
        yield name, method


ALGORITHMS |= dict(_of_other_packages())
METHODS: dict[str, type[AlgorithmConfig]] = {name: method.Config for name, method in ALGORITHMS.items()}
