"""Reformer: softmax attention among tokens that a random hash puts into one bucket."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.base import AttentionBase, alibi, option, real_first, require
from models.features.projections import gaussian, redraw_due

MOST_BUCKETS = 128  # by default: hashing costs memory for a number per token and bucket
FAR = 2**30  # the mark of a key that is not there


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of LSH attention."""

    num_keys: int = option(64, "most keys found by hashing: rounds x chunk before and after", budget=True)
    rounds: int = option(2, "independent hashes; a query looks at the keys of all")
    buckets: int = option(0, f"buckets of a hash, 1 or even; 0 = max_len / chunk, from 2 to {MOST_BUCKETS}")
    redraw_every: int = option(1, "training steps between redraws of the hashes; 0 = never")


class Attention(AttentionBase):
    """out_i = sum_{j in P_i} softmax_j(scale s_i.s_j / |s_j|) v_j,  s = (q + k) / 2  (arXiv 2001.04451, eq. 2).

    Kitaev et al. Round r hashes s to argmax [s w; -s w]. P_i (eq. 4-6) holds the tokens that share i's bucket
    in some round and are among the `chunk` before it there, in order of position, or among the `chunk` behind
    it unless causal. Each key counts once, however many rounds find it, as with the paper's log N_ij; a token
    sees itself only where P_i is empty, as with the paper's penalty of 10^5.

    Where this differs from the paper:
    * It has one projection for queries and keys, the encoder two: s is one projection whose weight is the mean
      of the two. So dq = dk, the functions are the paper's, and one projection's parameters are redundant.
    * It cuts the sorted sequence into chunks and looks at its own and the one before (eq. 5). Where the cuts
      fall depends on every token of the row, so that causal outputs depend on later ones. Here the window
      moves with the query and depends on the bucket's own tokens alone; it is evaluated chunk by chunk.
    * Buckets follow from max_len, never from N, and hold a chunk on average (the paper: half of one).
    * A query with no more others in sight than there are buckets looks at all of them: hashing would leave it
      one at most, on average.

    A round costs 12 B H N chunk D operations (causal 8), and B H N buckets D for its hash. O(N) memory.
    """

    Config = Config
    random = causal = linear_memory = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        require(config, rounds=1)
        if config.redraw_every < 0:
            raise ValueError(f"redraw_every must be 0 (never) or more; got {config.redraw_every}")
        if config.num_keys < 2 * config.rounds:
            raise ValueError(f"num_keys must be at least 2 x {config.rounds} rounds; got {config.num_keys}")
        if config.buckets < 0 or (config.buckets != 1 and config.buckets % 2):
            raise ValueError(f"buckets must be 0 (automatic), 1 or even; got {config.buckets}")
        self.chunk = config.num_keys // (2 * config.rounds)
        self.buckets = config.buckets or min(MOST_BUCKETS, 2 * max(1, self.max_len // (2 * self.chunk)))
        self.register_buffer("slopes_H", None, persistent=False)  # of ALiBi
        self.register_buffer("redraws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("w_HMD", self.draw())

    def draw(self) -> torch.Tensor:
        """The directions of all rounds, one for two buckets."""
        sizes = self.heads, self.config.rounds * ((self.buckets + 1) // 2), self.head_dim
        redraw = int(self.redraws)
        return gaussian(*sizes, orthogonal=False, seed=self.seed, layer=self.layer, redraw=redraw)

    def before_step(self, step):
        if redraw_due(self.redraws, step, self.config.redraw_every):
            self.w_HMD.copy_(self.draw())

    def add_alibi(self, slopes_H):
        self.slopes_H = slopes_H

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        s_BHND = (q_BHND + k_BHND) / 2
        if mask_BN is None:
            mask_BN = torch.ones_like(v_BHND[:, 0, :, 0], dtype=torch.bool)
        s_BHND = s_BHND.masked_fill(~mask_BN[:, None, :, None], 0)
        qkv = scale * s_BHND, F.normalize(s_BHND, dim=-1), v_BHND
        few_B1N, everything = self._few(qkv, mask_BN, causal)
        parts, marks = [everything], []
        for w_HMD in self.w_HMD.to(s_BHND.dtype).chunk(self.config.rounds, 1):
            along = s_BHND.detach() @ w_HMD.mT
            bucket_BHN = torch.cat([along, -along], -1)[..., : self.buckets].argmax(-1)
            bucket_BHN = bucket_BHN.masked_fill(~mask_BN[:, None], self.buckets)  # padding has its own
            parts.append(self._round(qkv, bucket_BHN, marks, few_B1N, causal))
        outs, totals, found = (torch.stack(part) for part in zip(*parts, strict=True))
        out_BHND = (totals.softmax(0)[..., None] * outs).sum(0)
        return torch.where(found.any(0)[..., None], out_BHND, v_BHND)

    def _round(self, qkv, bucket_BHN, marks, few_B1N, causal):
        """`masked_softmax` over the keys that this hash finds and none before it.

        A token's mark is its place when tokens are sorted by bucket and position: consecutive in a bucket, and
        further apart than a chunk between buckets. `marks` has those of the rounds before, and gets this one's.
        """
        N, chunk = bucket_BHN.shape[-1], min(self.chunk, bucket_BHN.shape[-1])
        position_N = torch.arange(N, device=bucket_BHN.device)
        order_BHN = (bucket_BHN * N + position_N).argsort(-1)
        rank_BHN = order_BHN.argsort(-1)
        marks.append((rank_BHN + bucket_BHN * (self.chunk + 1)).int())
        after = 0 if causal else chunk

        def queries(x):  # (B, H, N, X) -> (B, H, N / chunk, chunk, X), sorted
            x = torch.take_along_dim(x, order_BHN[..., None], 2)
            return F.pad(x, (0, 0, 0, -N % chunk)).unflatten(2, (-1, chunk))

        def keys(x, fill=0):  # (B, H, N, X) -> (B, H, N / chunk, X, chunk before + chunk + chunk after)
            x = torch.take_along_dim(x, order_BHN[..., None], 2)
            return F.pad(x, (0, 0, chunk, -N % chunk + after), value=fill).unfold(2, 2 * chunk + after, chunk)

        def gap(x_BHN):  # of every query to every key
            return queries(x_BHN[..., None]) - keys(x_BHN[..., None], FAR)

        ahead = gap(marks[-1])
        allowed = (ahead.abs() <= self.chunk) & ((ahead > 0) if causal else (ahead != 0))
        allowed &= ~queries(few_B1N.expand_as(bucket_BHN)[..., None])
        for mark in marks[:-1]:
            allowed &= gap(mark).abs() > self.chunk
        q, k, v = qkv
        logits = queries(q) @ keys(k)
        if self.slopes_H is not None:
            logits = logits - self.slopes_H[:, None, None, None] * gap(position_N.expand_as(bucket_BHN)).abs()
        out, *rest = masked_softmax(logits, allowed, keys(v).mT)
        total, found = (x.flatten(2).gather(-1, rank_BHN) for x in rest)
        return torch.take_along_dim(out.flatten(2, 3), rank_BHN[..., None], 2), total, found

    def _few(self, qkv, mask_BN, causal):
        """Which queries have no more others in sight than there are buckets, (B, 1, N), and their attention to
        all of these: they, and all that they see, are among the first buckets + 1 real tokens."""
        some = min(self.buckets + 1, mask_BN.shape[1])
        rank_BN = mask_BN.cumsum(1) - 1
        others_BN = rank_BN if causal else rank_BN[:, -1:].expand_as(rank_BN)
        few_B1N = (others_BN <= self.buckets)[:, None]
        first_BN = real_first(mask_BN)[:, :some]
        q, k, v = (torch.take_along_dim(x, first_BN[:, None, :, None], 2) for x in qkv)
        gap_BNN = first_BN[:, :, None] - first_BN[:, None]
        allowed_BNN = mask_BN.gather(1, first_BN)[:, None] & ((gap_BNN > 0) if causal else (gap_BNN != 0))
        logits_BHNN = q @ k.mT
        if self.slopes_H is not None:
            logits_BHNN = logits_BHNN - self.slopes_H[:, None, None] * gap_BNN[:, None].abs()
        out, total, found = masked_softmax(logits_BHNN, allowed_BNN[:, None].expand_as(logits_BHNN), v)
        place_B1N = rank_BN.clamp(0, some - 1)[:, None]
        total, found = (torch.take_along_dim(x, place_B1N, 2) for x in (total, found))
        total = total.masked_fill(~few_B1N, torch.finfo(total.dtype).min)
        return few_B1N, (torch.take_along_dim(out, place_B1N[..., None], 2), total, found & few_B1N)

    def flops(self, B, H, N, D):
        chunk, some = min(self.chunk, N), min(self.buckets + 1, N)
        rounds = 12 * -(-N // chunk) * chunk * chunk + 2 * N * ((self.buckets + 1) // 2)
        return B * H * D * (self.config.rounds * rounds + 4 * some * some)

    def state_bytes(self, N):
        chunk, some = min(self.chunk, N), min(self.buckets + 1, N)
        a_round = N * (8 * self.head_dim + 3 * 3 * chunk + 8)  # sorted q, k, v and windows; weights; places
        return 4 * self.heads * (self.config.rounds * a_round + 2 * N * self.head_dim + 3 * some * some)


def masked_softmax(logits, allowed, v):
    """Attention to the allowed keys, the logsumexp of their logits (the least number where there are none: a
    weight of 0 next to any other), and whether there are any."""
    logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    return logits.softmax(-1) @ v, logits.logsumexp(-1), allowed.any(-1)


def naive_reformer(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Equation 2 over P_i of equation 6, written out as a matrix for each batch element and head."""
    scale, N = q.shape[-1] ** -0.5 if scale is None else scale, q.shape[2]
    bias_HNN = torch.zeros(q.shape[1], N, N) if attention.slopes_H is None else alibi(attention.slopes_H, N)
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        real = torch.arange(N) if mask_BN is None else mask_BN[b].nonzero()[:, 0]
        n = torch.arange(len(real))
        visible = n[None] < n[:, None] if causal else n[None] != n[:, None]
        for h in range(q.shape[1]):
            s = (q[b, h, real] + k[b, h, real]) / 2
            P = (visible.sum(1, keepdim=True) <= attention.buckets).expand_as(visible)
            for w in attention.w_HMD[h].to(s.dtype).chunk(attention.config.rounds):
                bucket = torch.cat([s @ w.T, -s @ w.T], 1)[:, : attention.buckets].argmax(1)
                same = bucket[:, None] == bucket
                rank = (same & (n <= n[:, None])).sum(1)
                P = P | (same & ((rank[:, None] - rank).abs() <= attention.chunk))
            P = P & visible
            P = P | (torch.eye(len(n), dtype=torch.bool) & ~P.any(1, keepdim=True))
            logits = scale * s @ (s / s.norm(dim=1, keepdim=True)).T + bias_HNN[h][real][:, real].to(s.dtype)
            out[b, h, real] = logits.masked_fill(~P, float("-inf")).softmax(-1) @ v[b, h, real]
    return out
