"""Sequence parallel: several processes share one row, each a stretch of its tokens; for contexts one GPU cannot hold.

DeepSpeed's Ulysses (https://arxiv.org/abs/2309.14509): every process computes all layers for its own stretch, and in
attention they exchange, so that each sees the whole row for some of the heads. The exchange is DeepSpeed's
`DistributedAttention`; around it is our own per-sample attention, so packed samples stay apart. DeepSpeed's loader and
loss, which transformers uses, know neither pictures nor packing, and are not used.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Stretch:
    """Which of a row's `size` stretches this process has, and the `group` of processes that share the row."""

    rank: int
    size: int
    group: Any

    def padded(self, length: int) -> int:
        """The next length that can be shared out evenly."""
        return -(-length // self.size) * self.size

    def positions(self, position_ids: Tensor) -> Tensor:
        """int64[1, T] -> int64[1, T'], T' a multiple of `size`; what is added is a sample of its own, unlabelled."""
        extra = self.padded(position_ids.shape[1]) - position_ids.shape[1]
        return torch.cat([position_ids, torch.arange(extra, device=position_ids.device)[None]], dim=1)

    def own(self, row: Tensor, fill: float = 0) -> Tensor:
        """The stretch of this process: [1, T, ...] -> [1, T' / size, ...]."""
        extra = self.padded(row.shape[1]) - row.shape[1]
        whole = F.pad(row, (0, 0) * (row.dim() - 2) + (0, extra), value=fill)
        return whole.chunk(self.size, dim=1)[self.rank]

    def own_next(self, row: Tensor, fill: float) -> Tensor:
        """For each of this process's tokens what is said of the token after it, which may be another process's."""
        return self.own(F.pad(row[:, 1:], (0, 1), value=fill), fill)

    def attend(self, attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention over the whole row for a share of the heads.

        query float[1, H, T' / size, Dh], key and value float[1, Hkv, ...] -> float[1, T' / size, H, Dh]; `attention`
        takes [1, H / size, T', Dh] and gives [1, T', H / size, Dh].
        """
        from deepspeed.sequence.layer import DistributedAttention

        def local(*rows: Tensor) -> Tensor:
            result: Tensor = attention(*(row.transpose(1, 2) for row in rows))
            return result

        exchange = DistributedAttention(local, self.group, scatter_idx=2, gather_idx=1)
        shared: Tensor = exchange(*(part.transpose(1, 2).contiguous() for part in (query, key, value)), 0)
        return shared
