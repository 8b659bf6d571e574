"""bfloat16 matrices are multiplied as float32 on a CPU without instructions for them. Each test has its own process."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

START = """
import torch
from peertune.model import products

def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()

def is_widened(product):
    with torch.profiler.profile() as profile:
        product()
    return any(event.key == "aten::_to_copy" for event in profile.key_averages())
"""
GRADIENTS = """
products.widen()
x, w, bias, g = draw(3, 9, 40).requires_grad_(), draw(24, 40).requires_grad_(), draw(24), draw(3, 9, 24)
torch.nn.functional.linear(x, w, bias).backward(g)
rows, grads = x.detach().float().view(27, 40), g.float().view(27, 24)
assert torch.equal(torch.nn.functional.linear(x, w, bias).view(27, 24), (rows @ w.float().T + bias).bfloat16())
assert torch.equal(x.grad.view(27, 40), (grads @ w.float()).bfloat16())
assert torch.equal(w.grad, (grads.T @ rows).bfloat16())
assert is_widened(lambda: torch.nn.functional.linear(x, w, bias))
assert is_widened(lambda: torch.nn.functional.linear(x, w))
"""
IN_PLACE = """
a, b, c = draw(2, 9, 40), draw(2, 40, 16), torch.zeros(2, 9, 16).bfloat16()
before = a[:, :7] @ b, a.float() @ b.float()
products.widen()
want = (a.float() @ b.float())
assert torch.equal(a @ b, want.bfloat16())
assert torch.baddbmm(c, a, b, beta=0, alpha=0.5, out=c) is c
assert torch.equal(c, (0.5 * want).bfloat16())
assert torch.equal(torch.mm(a[0], b[0], out=torch.empty(0).bfloat16()), want[0].bfloat16())
for total, add in (c[0].clone(), (a[0], b[0])), (c.clone(), (a, b)):
    ours, sums = total.clone(), total.float() + (want if total.ndim == 3 else want[0])
    add_ = ours.addmm_ if total.ndim == 2 else ours.baddbmm_
    assert is_widened(lambda: add_(*add, beta=0)) and add_(*add, beta=0) is ours
    ours.copy_(total)
    assert torch.equal(add_(*add), sums.bfloat16()) and torch.equal(ours, sums.bfloat16())
after = a[:, :7] @ b, want
assert all(map(torch.equal, before, after))
assert is_widened(lambda: a @ b)
assert is_widened(lambda: torch.baddbmm(c, a, b, out=c))
assert not is_widened(lambda: a[:, :7] @ b)
assert not is_widened(lambda: torch.mm(want[0], want[0].T))
for refused in (
    lambda: a @ b.float(),
    lambda: a @ b[:, :3],
    lambda: torch.mm(a[0, 0], b[0]),
    lambda: torch.mm(a[0], b[0], out=torch.zeros(9, 16)),
):
    try:
        refused()
    except RuntimeError:
        continue
    raise AssertionError("a product that PyTorch refuses was made")
"""
ATTENTION = """
from torch.nn.functional import scaled_dot_product_attention as attend

products.widen()
q, k, v, g = draw(4, 2, 3, 40, 16)
mask = torch.zeros(40, 40).masked_fill_(torch.ones(40, 40).triu(1).bool(), float("-inf"))

def run(kind, **options):
    given = [x.to(kind).requires_grad_() for x in (q, k, v)]
    out = attend(*given, **options)
    return out, *torch.autograd.grad(out, given, g.to(kind))

for narrow, same in ({"is_causal": True},) * 2, ({"attn_mask": mask.bfloat16()}, {"attn_mask": mask}):
    (out, *grads), (want, *wide) = run(torch.bfloat16, **narrow), run(torch.float32, **same)
    assert torch.equal(out, want.bfloat16())
    for ours, theirs in zip(grads, wide, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - theirs).norm() < 1e-2 * theirs.norm()
assert is_widened(lambda: attend(q, k, v))
q, k, v = q.float(), k.float(), v.float()
assert not is_widened(lambda: attend(q, k, v))
"""
OTHER_THREADS = """
import sys
import threading

turns, done = [0], threading.Event()

def take_turns():
    while not done.is_set():
        turns[0] += 1

def turns_during(product):
    found = []
    for _ in range(10):
        before = turns[0]
        product()
        found.append(turns[0] - before)
    return max(found)  # on a loaded machine the other thread may wait for other processes, too

x = torch.ones(1200, 1200)
sys.setswitchinterval(1e-6)
thread = threading.Thread(target=take_turns)
thread.start()
plain = turns_during(lambda: x @ x)
products.widen()
wide, narrow = turns_during(lambda: x @ x), turns_during(lambda: x.bfloat16() @ x.bfloat16())
done.set()
thread.join()
assert min(wide, narrow) > plain / 10, (plain, wide, narrow)
"""
LOADING = """
from peertune.config import ModelSection
from peertune.model.load import load_model

def load(dtype):
    load_model(ModelSection(path="tiny", dtype=dtype, max_length=32), torch.device("cpu"))
    return products.widen.cache_info().currsize

products.are_native = lambda: True
assert load("bfloat16") == 0
products.are_native = lambda: False
assert load("float32") == 0
assert load("bfloat16") == 1
"""


@pytest.mark.parametrize(
    "code",
    [GRADIENTS, IN_PLACE, ATTENTION, OTHER_THREADS, LOADING],
    ids=["gradients", "in place", "attention", "other threads", "loading"],
)
def test_products_of_bfloat16_matrices(code: str) -> None:
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(START + code)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
