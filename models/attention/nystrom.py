"""Nystromformer: softmax attention through landmarks and the pseudo-inverse of their own attention."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.base import AttentionBase, option, real_first, require

CONV = 33  # tokens under the depthwise convolution


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the Nystrom approximation."""

    num_landmarks: int = option(64, "landmarks K, means of consecutive tokens", budget=True)
    iterations: int = option(6, "steps of the iterative pseudo-inverse")
    conv: bool = option(False, f"add the paper's depthwise convolution of the values, {CONV} tokens wide")


class Attention(AttentionBase):
    """out = softmax(scale q k~^T) Z softmax(scale q~ k^T) v  (Xiong et al., arXiv 2102.03902, eq. 15).

    q~ and k~ (K, D) are means of q and k over K consecutive segments of the real tokens, whose lengths differ
    by one at most; a row of fewer than K real tokens has that many landmarks. Z approximates the
    pseudo-inverse of A = softmax(scale q~ k~^T) by `pseudo_inverse`, for each row and head on its own. Our K is
    the paper's m. The paper also adds a convolution of the values; here that is an option, off, because it
    mixes neighbours whatever the attention does. Not causal: a landmark averages all of its segment.

    Weights may be negative and large where A is close to singular, so all of it runs in fp32 at least.
    8 B H N K D + 4 B H K^2 D + 8 iterations B H K^3 operations, O(N + K^2) memory.
    """

    Config = Config
    linear_memory = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        require(config, num_landmarks=1, iterations=0)
        if config.conv:
            self.conv_HN = nn.Parameter(torch.empty(self.heads, CONV).uniform_(-(CONV**-0.5), CONV**-0.5))

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        if mask_BN is None:
            mask_BN = torch.ones_like(v_BHND[:, 0, :, 0], dtype=torch.bool)
        index_BN, inside_BKN = segments(mask_BN, min(self.config.num_landmarks, mask_BN.shape[1]))
        q_BHKD, k_BHKD = (means(x, index_BN, inside_BKN) for x in (q_BHND, k_BHND))
        landmark_BK = inside_BKN.any(-1)
        # A row without real tokens may look anywhere: its softmaxes stay finite, and A = 0 makes it 0.
        real_B1 = landmark_BK[:, :1]
        over_landmarks_B11K = (landmark_BK | ~real_B1)[:, None, None]
        over_tokens_B11N = (mask_BN | ~real_B1)[:, None, None]
        a_BHKK = (scale * q_BHKD @ k_BHKD.mT).masked_fill(~over_landmarks_B11K, float("-inf")).softmax(-1)
        z_BHKK = pseudo_inverse(a_BHKK.masked_fill(~landmark_BK[:, None, :, None], 0), self.config.iterations)
        attention = functools.partial(F.scaled_dot_product_attention, scale=scale)
        y_BHKD = attention(q_BHKD, k_BHND, v_BHND, attn_mask=over_tokens_B11N)
        out_BHND = attention(q_BHND, k_BHKD, z_BHKK @ y_BHKD, attn_mask=over_landmarks_B11K)
        return out_BHND + depthwise(v_BHND, self.conv_HN.to(v_BHND.dtype)) if self.config.conv else out_BHND

    def flops(self, B, H, N, D):
        K, steps = min(self.config.num_landmarks, N), self.config.iterations
        conv = 2 * B * H * N * D * CONV if self.config.conv else 0
        return B * H * (8 * N * K * D + 4 * K * K * D + 8 * steps * K**3) + conv

    def state_bytes(self, N):
        K = min(self.config.num_landmarks, N)
        tokens = 2 * (N + K) * self.head_dim + N  # the segments of q and k, the log-sum-exp of each query
        return 4 * self.heads * (tokens + 4 * K * self.head_dim + (5 * self.config.iterations + 2) * K * K)


def segments(mask_BN: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The real tokens of each row in K consecutive segments, the first ones longer by a token.

    Returns the positions of the tokens, segment after segment, each in ceil(N / K) places (B, K ceil(N / K)),
    and which of these places are taken (B, K, ceil(N / K)). A row of n < K real tokens fills n segments.
    """
    N, device = mask_BN.shape[1], mask_BN.device
    count_B1 = mask_BN.sum(1, keepdim=True)
    filled_B1 = count_B1.clamp(1, K)
    edge_K = torch.arange(K + 1, device=device)
    start_BK = edge_K * (count_B1 // filled_B1) + torch.minimum(edge_K, count_B1 % filled_B1)
    start_BK = start_BK.minimum(count_B1)
    place_BKN = start_BK[:, :-1, None] + torch.arange(-(-N // K), device=device)
    index_BN = real_first(mask_BN).gather(1, place_BKN.flatten(1).clamp(max=N - 1))
    return index_BN, place_BKN < start_BK[:, 1:, None]


def means(x_BHND: torch.Tensor, index_BN: torch.Tensor, inside_BKN: torch.Tensor) -> torch.Tensor:
    """The mean of x over each of the `segments`, (B, H, K, D); 0 where a segment is empty."""
    x = torch.take_along_dim(x_BHND, index_BN[:, None, :, None], 2).unflatten(2, inside_BKN.shape[1:])
    inside_B1KN1 = inside_BKN[:, None, :, :, None]
    return x.masked_fill(~inside_B1KN1, 0).sum(3) / inside_B1KN1.sum(3).clamp(min=1)


def pseudo_inverse(a_BHKK: torch.Tensor, iterations: int) -> torch.Tensor:
    """Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T / (|A|_1 |A|_inf)  (section 3.2 of the paper).

    Rows of A add up to 1 or are 0, so that |A|_inf = 1; |A|_1, the largest sum of a column, is taken for each
    matrix alone. Zero rows and columns stay zero. For a singular value sigma of A, Z starts at sigma / |A|_1 and
    grows by 13/4 a step at most: where sigma^2 is far below |A|_1 (4/13)^iterations, 1 / sigma is never reached.
    """
    largest = a_BHKK.sum(-2).amax(-1)[..., None, None].clamp(min=0.5)  # 0 only where A = 0, else at least 1
    z_BHKK = a_BHKK.mT / largest
    eye_KK = torch.eye(a_BHKK.shape[-1], dtype=a_BHKK.dtype, device=a_BHKK.device)
    for _ in range(iterations):
        az = a_BHKK @ z_BHKK
        z_BHKK = z_BHKK @ (13 * eye_KK - az @ (15 * eye_KK - az @ (7 * eye_KK - az))) / 4
    return z_BHKK


def depthwise(x_BHND: torch.Tensor, weight_HN: torch.Tensor) -> torch.Tensor:
    """Each head's filter over the tokens, the same for every coordinate: sum_t weight_t x_{n + t - width // 2}.

    A sum of shifted copies, because F.conv2d with groups gives wrong fp32 weight gradients, or ends the process,
    in torch 2.13 on a CPU with AVX-512 (its oneDNN kernel).
    """
    N, width = x_BHND.shape[2], weight_HN.shape[1]
    padded = F.pad(x_BHND, (0, 0, width // 2, width // 2))
    return sum(weight_HN[:, t, None, None] * padded[:, :, t : t + N] for t in range(width))


def naive_nystrom(attention, q, k, v, mask_BN=None, *, scale=None):
    """Equation 15, one batch element and head at a time, on the real tokens only."""
    config, out, N = attention.config, torch.zeros_like(v), q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b in range(q.shape[0]):
        real = torch.arange(N) if mask_BN is None else mask_BN[b].nonzero()[:, 0]
        parts = real.tensor_split(min(config.num_landmarks, len(real))) if len(real) else ()
        for h in range(q.shape[1] if parts else 0):
            q_landmarks, k_landmarks = (torch.stack([x[b, h, p].mean(0) for p in parts]) for x in (q, k))
            A = torch.softmax(scale * q_landmarks @ k_landmarks.T, -1)
            Z, eye = A.T / (A.sum(0).amax() * A.sum(1).amax()), torch.eye(len(A), dtype=A.dtype)
            for _ in range(config.iterations):
                Z = Z @ (13 * eye - A @ Z @ (15 * eye - A @ Z @ (7 * eye - A @ Z))) / 4
            left = torch.softmax(scale * q[b, h] @ k_landmarks.T, -1)
            right = torch.softmax(scale * q_landmarks @ k[b, h, real].T, -1)
            out[b, h] = left @ Z @ right @ v[b, h, real]
            if config.conv:
                shift = real - torch.arange(N)[:, None]
                weight = attention.conv_HN[h].to(v.dtype)[(shift + CONV // 2).clamp(0, CONV - 1)]
                out[b, h] = out[b, h] + (weight * (shift.abs() <= CONV // 2)) @ v[b, h, real]
    return out
