"""Where the sequences of a packed row start and end, and which tokens each of them sees.

Attention needs that in every forward, as numbers of the host too. It follows from the row's positions; but read from
positions on a GPU, it makes the host wait until the GPU is through with all that was asked of it. So it is found on the
CPU, where rows are packed, and travels with the row.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Bounds:
    """Of a row of `N` tokens, `S` sequences.

    Attributes:
        own: int32 [S + 1], where in the row the sequences start and end.
        seen: int32 [S + 1], the same for the keys that they see, shared ones first; `own` where nothing is shared.
        key_index: int64 [M], the places in the row of these keys; None: each sequence sees its own.
        longest: Keys of the sequence that sees most.
        tokens: N.
    """

    own: torch.Tensor
    seen: torch.Tensor
    key_index: torch.Tensor | None
    longest: int
    tokens: int

    @property
    def sequences(self) -> int:
        return self.own.numel() - 1

    @classmethod
    def of(cls, position_ids: torch.Tensor) -> "Bounds":
        """Of positions, on the CPU; of positions on a GPU this waits for it.

        Args:
            position_ids: int64 [1, N] of one token at least, from 0 in each sequence; or from p where a sequence goes
                on from the first p tokens of the last one that began at 0.

        Raises:
            ValueError: A sequence goes on from tokens that are not there.
        """
        positions = position_ids.reshape(-1).cpu()
        restart = torch.ones_like(positions, dtype=torch.bool)
        restart[1:] = positions.diff() != 1
        starts = restart.nonzero()[:, 0]
        own = torch.cat([starts, starts.new_tensor([positions.numel()])])
        lengths, prefixes = own.diff(), positions[starts]
        counts = prefixes + lengths
        longest, tokens = int(counts.max()), positions.numel()
        if not prefixes.any():
            return cls(own.int(), own.int(), None, longest, tokens)
        # The last sequence that began at 0, of each.
        roots = torch.where(prefixes == 0, torch.arange(starts.numel()), -1).cummax(0).values
        if (roots < 0).any() or (prefixes < 0).any() or (prefixes > lengths[roots]).any():
            raise ValueError(
                f"position_ids restart at {prefixes.tolist()}, expected 0, or at most the length of the last sequence "
                f"that began at 0; their lengths are {lengths.tolist()}"
            )
        seen = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place = torch.arange(int(seen[-1])) - seen[:-1].repeat_interleave(counts)
        prefix, root, start = (part.repeat_interleave(counts) for part in (prefixes, starts[roots], starts))
        key_index = place + torch.where(place < prefix, root, start - prefix)
        return cls(own.int(), seen.int(), key_index, longest, tokens)

    def to(self, device: torch.device) -> "Bounds":
        """The same with its tensors on a device, which is not waited for."""
        own = self.own.to(device, non_blocking=True)
        if self.key_index is None:
            return replace(self, own=own, seen=own)
        seen, key_index = (part.to(device, non_blocking=True) for part in (self.seen, self.key_index))
        return replace(self, own=own, seen=seen, key_index=key_index)

    def check(self, position_ids: torch.Tensor) -> None:
        """Raise `ValueError` where these are the bounds of another row.

        Args:
            position_ids: int64 [1, N]. Their values are looked at on the CPU alone: elsewhere that would be a wait.
        """
        right = self.tokens == position_ids.numel()
        if right and position_ids.is_cpu:
            expected = Bounds.of(position_ids)
            pairs = ((self.own, expected.own), (self.seen, expected.seen), (self.key_index, expected.key_index))
            right = self.longest == expected.longest and all(
                ours is theirs or (ours is not None and theirs is not None and torch.equal(ours.cpu(), theirs))
                for ours, theirs in pairs
            )
        if not right:
            raise ValueError(f"bounds are of another row of {self.tokens} tokens, expected those of position_ids")
