"""What the contract is checked on: attentions with their options, sizes and masks, inputs, and comparisons."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lra import registry

PADDING = 4  # tokens that a check may append: max_len is N + PADDING
HALVES = (torch.bfloat16, torch.float16)


class Setting(NamedTuple):
    """Sizes (B, H, N, D), distinct primes so that a confused axis cannot fit, and whether rows are padded."""

    size: tuple[int, int, int, int]
    ragged: bool

    def __str__(self):
        return "x".join(map(str, self.size)) + ("-ragged" if self.ragged else "")

    def mask(self) -> torch.Tensor | None:
        """Row b has N - 1 - 3b real tokens, at least one; None without padding."""
        B, _, N, _ = self.size
        return torch.stack([torch.arange(N) < max(1, N - 1 - 3 * b) for b in range(B)]) if self.ragged else None


PADDED = Setting((2, 3, 7, 5), True)
SETTINGS = [Setting(PADDED.size, False), PADDED, Setting((1, 1, 1, 5), False), Setting((2, 1, 11, 13), True)]


class Case(NamedTuple):
    """An attention by its registry name, with options; `causal`: asked for its causal form in every call."""

    name: str
    options: dict[str, Any] = {}
    causal: bool = False

    def __str__(self):
        options = "".join(f",{key}={value}" for key, value in self.options.items())
        return self.name + options + (",causal" if self.causal else "")

    @property
    def cls(self) -> type:
        return registry.attention_class(self.name)

    @property
    def loads(self) -> bool:
        """Whether there is a class with a Config: a file may be broken."""
        try:
            return dataclasses.is_dataclass(self.cls.Config)
        except Exception:
            return False

    @property
    def reference(self) -> Callable[..., torch.Tensor] | None:
        outside = self.name.partition(":")[2].lower()
        naive = getattr(sys.modules[self.cls.__module__], f"naive_{outside or self.name}", None)
        return functools.partial(naive, causal=True) if naive and self.causal else naive

    def build(self, setting: Setting, dtype=torch.float64, *, trained=True, max_len=None, **options) -> Any:
        """In evaluation mode. `trained` moves every parameter away from its initial value: at G = I, say,
        a transposed G would go unnoticed. `seed` and `layer` are options here."""
        _, H, N, D = setting.size
        torch.manual_seed(0)
        max_len = max_len or N + PADDING
        attention = registry.build_attention(
            self.name, heads=H, head_dim=D, max_len=max_len, **(self.options | options)
        ).to(dtype)
        with torch.no_grad():
            for parameter in attention.parameters() if trained else ():
                rms = parameter.square().mean().sqrt()
                parameter += 0.3 * torch.where(rms > 0, rms, 1.0) * torch.randn_like(parameter)
            if trained:
                # On short vectors with a mean and unequal directions: what is calibrated is not the identity.
                q, k = (0.15 * (x + torch.linspace(-1, 2, D)).to(dtype) for x in torch.randn(2, 3, H, 19, D))
                attention.calibrate(q * torch.linspace(0.5, 1.5, D).to(dtype), k)
        if self.causal:
            attention.forward = functools.partial(attention.forward, causal=True)
        return attention.eval()


class Check(NamedTuple):
    """`run(case)`, or `run(case, setting)` when sized; `applies(case)`: is the claim made at all?"""

    name: str
    run: Callable[..., None]
    sized: bool
    applies: Callable[[Case], bool]

    def __call__(self, case: Case) -> None:
        """Run the check; a sized one with every setting, but that of the first without padding where options are not
        the defaults. The setting that fails is named."""
        if not self.sized:
            return self.run(case)
        for setting in SETTINGS[1:] if case.options else SETTINGS:
            try:
                self.run(case, setting)
            except AssertionError as error:
                raise AssertionError(f"{setting} {error}") from error


def combined(case: Case) -> bool:
    """Whether several options are given: what takes seconds is checked on these and on the defaults."""
    return len(case.options) > 1


CHECKS: dict[str, Check] = {}


def check(*, sized: bool = False, applies: Callable[[Case], bool] = lambda case: True):
    """Register a function as one check of the contract, under its own name."""

    def register(run):
        CHECKS[run.__name__] = Check(run.__name__, run, sized, applies)
        return run

    return register


# Inputs and comparisons


def inputs(setting: Setting, dtype=torch.float64, *, seed: int = 0, strength: float = 1.0) -> list[torch.Tensor]:
    """q, k (times `strength`) and v, standard normal, as leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(setting.size, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.to(dtype).requires_grad_() for x in (strength * q, strength * k, v)]


def appended(x: torch.Tensor, more: torch.Tensor, dim: int) -> torch.Tensor:
    """x then more, as a fresh leaf."""
    return torch.cat([x.detach(), more.detach()], dim).requires_grad_()


def real_tokens(out: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`out` with padded positions set to zero: what stands there is not part of the contract."""
    return out if mask is None else out.masked_fill(~mask[:, None, :, None], 0)


def outputs_and_gradients(out, mask, **leaves) -> dict[str, torch.Tensor]:
    """`out` and the gradients of a fixed random functional of its real tokens; 0 for an unused leaf."""
    out = real_tokens(out, mask)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    loss = (weight.to(out.dtype) * out).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), grads, strict=True)
    return {"out": out.detach()} | {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal within `tolerance`, absolute and relative to the largest entry of each tensor."""
    for name, want in wanted.items():
        worst = (got[name] - want).abs().max() / want.abs().max().clamp(min=1)
        single = want.dtype == torch.float64 and tolerance < worst < 1e-5
        hint = ", as a constant or a tensor in float32 would make it" if single else ""
        assert worst <= tolerance, f"{name} differs by {worst:.2e} > {tolerance:.0e}{hint}"


def assert_finite(tensors: dict[str, torch.Tensor], where: Any) -> None:
    for name, x in tensors.items():
        assert x.isfinite().all(), f"{name} is not finite: {where}"


def sdpa(q, k, v, mask, scale, causal=False):
    """Softmax attention by PyTorch, the target of `exact` and of `random` methods."""
    allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    allowed = allowed if mask is None else allowed & mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def run(attention, q, k, v, mask=None, **arguments) -> dict[str, torch.Tensor]:
    """Output and gradients of an attention, with respect to its inputs and its parameters."""
    out = attention(q, k, v, mask, **arguments)
    return outputs_and_gradients(out, mask, q=q, k=k, v=v, **dict(attention.named_parameters()))


def raises(kind: type[Exception], call: Callable[[], Any], what: str) -> str:
    """The message of the error that `call` has to raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{what} was accepted without a {kind.__name__}")
