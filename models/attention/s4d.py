"""S4D: a diagonal state-space model in the place of attention, the contender that is not one."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.base import option, packed, take
from models.features.recurrent import Recurrence

CHUNK = 64  # tokens between two states


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the state space."""

    num_states: int = option(64, "states of each channel, half for either direction; a multiple of 4")


class Attention(Recurrence):
    """x_i = e^(t A) x_(i-1) + (e^(t A) - 1) / A v_i,    out_i = 2 Re(C x_i) + skip v_i

    for every channel (head and coordinate) of v on its own, with diagonal complex A, one of each conjugate pair;
    A, C, skip and the step t are learned, B = 1 (S4D, Gu et al., arXiv 2206.11893: eq. 2, discretised by
    zero-order hold; its D is our skip; S4D-Lin's start, A_n = -1/2 + i pi n). q, k and `scale` are not read.
    Half of the states run forward in time, the others backward from the next token on; causal: all run forward.
    Time counts real tokens: padding between two of them does not pass it.

    It is a convolution with K_l = 2 Re(C (e^(t A) - 1) / A e^(l t A)), in fp32 at least and without FFT: chunks
    of 64 tokens are multiplied by their Toeplitz matrix, and states pass from chunk to chunk. An FFT would mix
    rounding errors of later tokens into earlier outputs, and needs complex tensors, which Inductor does not
    compile. 2 B H N D (64 + 2 num_states) operations. 2 num_states + 2 parameters a channel: with 64 states and
    a width of 64, as many as softmax spends on its projections of q and k.

    The paper trains A and t at a rate of 1e-3 or less and without decay. Here they do not decay either, but take
    the recipe's rate like all else. t starts between 1e-3 and 1e-1: memories of 20 to 2,000 tokens. The gated
    linear unit that the paper puts behind each layer is left out: what follows is the shared encoder's FFN.
    """

    Config = Config
    reads_qk = False

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        if config.num_states < 4 or config.num_states % 4:
            raise ValueError(f"num_states must be a multiple of 4 (pairs, in two directions); got {config.num_states}")
        # E = H D channels; the first half of the S pairs of states runs forward in time.
        E, S = self.heads * self.head_dim, config.num_states // 2
        frequency_S = math.pi * torch.arange(S // 2).repeat(2)
        self.log_decay_ES = nn.Parameter(torch.full((E, S), math.log(0.5)))
        self.frequency_ES = nn.Parameter(frequency_S.repeat(E, 1))
        self.readout_2ES = nn.Parameter(torch.randn(2, E, S) / 2**0.5)  # C: real parts, imaginary parts
        self.log_step_E = nn.Parameter(torch.empty(E).uniform_(math.log(1e-3), math.log(1e-1)))
        self.skip_E = nn.Parameter(torch.randn(E))

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        out_BHND = packed(lambda v, _: self._convolve(v, causal), mask_BN, v_BHND)
        return out_BHND if mask_BN is None else out_BHND.masked_fill(~mask_BN[:, None, :, None], 0)

    def _convolve(self, v_BHND, causal):
        """`attend` without padding, by chunks."""
        B, H, N, D = v_BHND.shape
        L = min(CHUNK, N)
        v_BHJLD = F.pad(v_BHND, (0, 0, 0, -N % L)).view(B, H, -1, L, D)
        v_EJBL = v_BHJLD.permute(1, 4, 2, 0, 3).reshape(H * D, -1, B, L)
        exponent, gain = self._discrete(v_BHND.dtype)
        power = powers(*exponent, L + 1)
        echo = times([x[..., None] for x in gain], power)  # of a token that came l tokens ago
        # Each direction has a half of the pairs, or the causal one all of them and the other none.
        split = [power[0].shape[1] // (1 if causal else 2)] * (1 if causal else 2)
        directions = list(zip(*(x.split(split, 1) for x in (*power, *echo)), strict=True))
        past_EL = directions[0][2].sum(1)[:, :L]
        future_EL = torch.zeros_like(past_EL) if causal else directions[1][2].sum(1)[:, :L]
        lags = torch.cat([future_EL[:, : L - 1].flip(1), past_EL], 1)
        lags = lags + F.pad(self.skip_E.to(lags.dtype)[:, None], (L - 1, L - 1))
        # Row n of the matrix holds K_(i - n) for all i: a window that moves back along the lags.
        out_EJBL = (v_EJBL.flatten(1, 2) @ lags.unfold(1, L, 1).flip(1)).view_as(v_EJBL)
        if N > L:
            for i, pairs in enumerate(directions):
                out_EJBL = out_EJBL + carried(v_EJBL, pairs[:2], pairs[2:], reverse=i == 1)
        return out_EJBL.view(H, D, -1, B, L).permute(3, 0, 2, 4, 1).reshape(B, H, -1, D)[:, :, :N]

    def _discrete(self, dtype):
        """t A and 2 C (e^(t A) - 1) / A, each as real and imaginary part (E, S)."""
        log_decay, a_im, c_re, c_im, log_step = (
            x.to(dtype) for x in (self.log_decay_ES, self.frequency_ES, *self.readout_2ES, self.log_step_E)
        )
        a_re, step_E1 = -log_decay.exp(), log_step.exp()[:, None]
        x, y = step_E1 * a_re, step_E1 * a_im
        # e^z - 1 of a small z, without cancellation: cos y - 1 = -2 sin(y/2)^2.
        grown = x.expm1() * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin()
        size = a_re.square() + a_im.square()
        return (x, y), times((2 * c_re, 2 * c_im), times(grown, (a_re / size, -a_im / size)))

    def advance(self, q_BHD, k_BHD, v_BHD, state, scale):
        exponent, gain = self._discrete(v_BHD.dtype)
        v_BE1 = v_BHD.flatten(1)[..., None]
        leap = [x[..., 1] for x in powers(*exponent, 2)]
        state = tuple(x + new for x, new in zip(times(leap, state), (v_BE1, torch.zeros_like(v_BE1)), strict=True))
        read_BHD = times(gain, state)[0].sum(-1).view_as(v_BHD)
        return read_BHD + self.skip_E.to(v_BHD.dtype).view(v_BHD.shape[1:]) * v_BHD, state

    def gather(self, k_BHND, v_BHND, mask_BN, scale):
        v, L = take(v_BHND, mask_BN.argsort(dim=1, stable=True)), min(CHUNK, v_BHND.shape[2])  # zeros first: no time
        v_JBEL = F.pad(v, (0, 0, -v.shape[2] % L, 0)).unflatten(2, (-1, L)).permute(2, 0, 1, 4, 3).flatten(2, 3)
        power = powers(*self._discrete(v.dtype)[0], L + 1)
        state = 0.0, 0.0
        for v_BEL in v_JBEL:
            new = (torch.einsum("bel,esl->bes", v_BEL, x[..., :L].flip(-1)) for x in power)
            state = tuple(x + y for x, y in zip(times([x[..., L] for x in power], state), new, strict=True))
        return state

    def flops(self, B, H, N, D):
        L = min(CHUNK, N)
        J = -(-N // L)
        return 2 * B * H * D * J * L * (L + (2 * self.config.num_states if J > 1 else 0))

    def state_bytes(self, N):
        J = -(-N // CHUNK)
        return 4 * self.heads * self.head_dim * (2 * N + 2 * J * self.config.num_states + min(CHUNK, N) ** 2)


def times(a, b):
    """Product of complex numbers as (real, imaginary) pairs: Inductor has no code for complex tensors."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def powers(x: torch.Tensor, y: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e^(l (x + iy)) for l = 0 ... count - 1, along a new last axis."""
    age = torch.arange(count, device=x.device, dtype=x.dtype)
    size, angle = (age * x[..., None]).exp(), age * y[..., None]
    return size * angle.cos(), size * angle.sin()


def carried(v_EJBL, power, echo, *, reverse):
    """What the other chunks add to each chunk: those before it, or with `reverse` those behind it.

    A chunk is summed up at its end (its start) into one state, states pass on from chunk to chunk, and every
    token reads the one that arrives. `power` and `echo`: pairs (E, S, L + 1), z^l and gain z^l.
    """
    E, J, B, L = v_EJBL.shape
    enter, leave = torch.cat(power, 1)[..., :L], torch.cat([echo[0], -echo[1]], 1)
    enter, leave = (enter, leave[..., :L].flip(-1)) if reverse else (enter.flip(-1), leave[..., 1:])
    summed = (v_EJBL.flatten(1, 2) @ enter.transpose(1, 2)).view(E, J, B, -1).unbind(1)
    leap = [x[:, None, :, L] for x in power]
    state, arriving = [torch.zeros_like(x) for x in summed[0].chunk(2, -1)], []
    for new in reversed(summed) if reverse else summed:
        arriving.append(torch.cat(state, -1))
        state = [turned + x for turned, x in zip(times(leap, state), new.chunk(2, -1), strict=True)]
    arriving = torch.stack(arriving[::-1] if reverse else arriving, 1)
    return (arriving.flatten(1, 2) @ leave).view_as(v_EJBL)


def naive_s4d(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Equation 2, discretised, in complex numbers: one token at a time over the real tokens of each row."""
    A = torch.complex(-attention.log_decay_ES.exp(), attention.frequency_ES).to(torch.complex128)
    z = torch.exp(attention.log_step_E.exp()[:, None] * A)
    C = torch.complex(*attention.readout_2ES)
    half = A.shape[1] if causal else A.shape[1] // 2
    rows = []
    for b in range(v.shape[0]):
        real = torch.arange(v.shape[2]) if mask_BN is None else mask_BN[b].nonzero()[:, 0]
        v_NE = v[b][:, real].transpose(0, 1).flatten(1)
        x, y = torch.zeros_like(z[:, :half]), torch.zeros_like(z[:, half:])
        out = [attention.skip_E * v_E for v_E in v_NE]
        for i in range(len(real)):
            x = z[:, :half] * x + ((z - 1) / A)[:, :half] * v_NE[i, :, None]
            out[i] = out[i] + 2 * (C[:, :half] * x).real.sum(1)
        for i in reversed(range(len(real))):
            out[i] = out[i] + 2 * (C[:, half:] * y).real.sum(1)
            y = z[:, half:] * y + ((z - 1) / A)[:, half:] * v_NE[i, :, None]
        row_NE = torch.zeros_like(v[b].transpose(0, 1).flatten(1))
        if out:
            row_NE = row_NE.index_put((real,), torch.stack(out))
        rows.append(row_NE.unflatten(1, v.shape[1::2]).transpose(0, 1))
    return torch.stack(rows)
