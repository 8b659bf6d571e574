"""DLoRA-FA (in DeCAF, arXiv 2505.21382): factor A keeps its common first value, only B is trained and exchanged.

With one A for all, averaging B averages the products: sum_j w_ij B_j A = (sum_j w_ij B_j) A.
"""

from peertune.algorithms.dec_lora import TwoFactor


class DloraFa(TwoFactor):
    frozen = ("lora_A",)
