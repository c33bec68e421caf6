"""BlockManager: which sequence holds which blocks of the key/value cache, and which blocks can be reused. No torch.

    if blocks.can_allocate(sequence):
        blocks.allocate(sequence)          # its cached prefix counts as computed
    while not blocks.may_append(sequence): ...preempt somebody...
    blocks.append(sequence); ...; blocks.share(sequence); blocks.deallocate(sequence)

The cache is cut into blocks of `block_size` tokens (vLLM's PagedAttention, arXiv 2309.06180), so that memory is handed
out as sequences grow. A full block that has been computed is named by a hash of its tokens and of all before it, chained
from the request's salt; a later sequence that begins alike takes such blocks instead of computing them. Only full blocks
are shared, and a full block never changes: nothing is ever copied.

A block without holders stays in the free list with its name until it is handed out anew. The list is in order of last
use, unnamed blocks first, and the end of a sequence before its beginning: a prefix is of use without what follows it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from octad.engine.sequence import Sequence


class BlockManager:
    """Reference counts, the free list and the names of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.holders = [0] * num_blocks
        self.names: list[bytes | None] = [None] * num_blocks
        self.named: dict[bytes, int] = {}
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    # ---- a sequence's life ---------------------------------------------------------------------------------

    def can_allocate(self, sequence: Sequence, spare: int = 0) -> bool:
        """True where all of the sequence's tokens find room now, and `spare` free blocks are left after it."""
        hits = self.cached(sequence)
        unheld = sum(not self.holders[block] for block in hits)
        needed = self.blocks_for(len(sequence)) - len(hits)
        return needed + unheld + spare <= len(self.free)

    def allocate(self, sequence: Sequence) -> int:
        """Give a sequence without blocks all that its tokens need; returns how many tokens were in the cache and count
        as computed."""
        hits = self.cached(sequence)
        for block in hits:
            self._hold(block)
        fresh = self.blocks_for(len(sequence)) - len(hits)
        sequence.blocks = array("i", hits)
        sequence.blocks.extend(self._take() for _ in range(fresh))
        sequence.num_shared = len(hits)
        sequence.num_computed = len(hits) * self.block_size
        return sequence.num_computed

    def may_append(self, sequence: Sequence) -> bool:
        """True where the sequence's newest token has room, or a free block is there for it."""
        return bool(self.free) or len(sequence.blocks) * self.block_size >= len(sequence)

    def append(self, sequence: Sequence) -> None:
        """Add the block that the sequence's newest token needs, if it needs one."""
        if len(sequence.blocks) * self.block_size < len(sequence):
            sequence.blocks.append(self._take())

    def share(self, sequence: Sequence) -> None:
        """Put the full blocks that have been computed into the prefix cache. The first block of a content stays the
        cached one."""
        full = sequence.num_computed // self.block_size
        while sequence.num_shared < full:
            block, name = sequence.blocks[sequence.num_shared], self._name(sequence, sequence.num_shared)
            if name not in self.named:
                self.named[name], self.names[block] = block, name
            sequence.num_shared += 1

    def deallocate(self, sequence: Sequence) -> None:
        """Take all blocks back; named ones can still be reused. The sequence counts as not computed."""
        for block in reversed(sequence.blocks):
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free[block] = None
                self.free.move_to_end(block, last=self.names[block] is not None)
        sequence.blocks = array("i")
        sequence.num_computed = sequence.num_shared = 0

    # ---- the prefix cache ----------------------------------------------------------------------------------

    def cached(self, sequence: Sequence) -> list[int]:
        """The cached blocks that the sequence begins with. Its last token is never among them: the model has to run on
        at least one token to say what follows. The first answer leaves what its request wants to see computed."""
        found: list[int] = []
        most, allowed = len(sequence) - 1, sequence.request.max_cached
        if allowed is not None and sequence.index == 0:
            most = min(most, allowed)
        for i in range(most // self.block_size):
            block = self.named.get(self._name(sequence, i))
            if block is None:
                break
            found.append(block)
        return found

    def forget(self) -> None:
        """Drop all names: nothing computed so far is reused."""
        self.named.clear()
        self.names = [None] * self.num_blocks

    def _name(self, sequence: Sequence, i: int) -> bytes:
        """The chained hash of the sequence's i-th block, which must be full."""
        keys, size = sequence.keys, self.block_size
        while len(keys) <= i:
            before = keys[-1] if keys else b"salt" + sequence.request.salt
            tokens = array("q", sequence.token_ids[len(keys) * size : (len(keys) + 1) * size])
            keys.append(blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return keys[i]

    def _hold(self, block: int) -> None:
        if not self.holders[block]:
            del self.free[block]
        self.holders[block] += 1

    def _take(self) -> int:
        """The free block that is missed least; its name is gone."""
        block, _ = self.free.popitem(last=False)
        name = self.names[block]
        if name is not None:
            del self.named[name]
            self.names[block] = None
        self.holders[block] = 1
        return block
