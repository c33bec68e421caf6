"""Blocks: by hand, and by a random life in which every block's count is its holders and nothing is lost."""

import random

import pytest

from octad.engine.block_manager import BlockManager
from octad.engine.outputs import RequestMetrics
from octad.engine.params import SamplingParams
from octad.engine.sequence import Request, Sequence


def sequence(tokens: list[int], salt: bytes = b"") -> Sequence:
    return Request("r", tokens, SamplingParams(), RequestMetrics(0.0), salt=salt).sequences[0]


def computed(blocks: BlockManager, one: Sequence) -> None:
    one.num_computed = len(one)
    blocks.share(one)


def check(blocks: BlockManager, living: list[Sequence]) -> None:
    """Counts are holders, free blocks are those without, names and blocks belong to each other."""
    held = [sum(list(s.blocks).count(b) for s in living) for b in range(blocks.num_blocks)]
    assert blocks.holders == held
    assert sorted(blocks.free) == [b for b, count in enumerate(held) if not count]
    assert {name: b for b, name in enumerate(blocks.names) if name is not None} == blocks.named
    for one in living:
        assert len(set(one.blocks)) == len(one.blocks)


def test_a_life_by_hand() -> None:
    blocks = BlockManager(num_blocks=4, block_size=4)
    one = sequence(list(range(6)))
    assert blocks.can_allocate(one)
    assert blocks.allocate(one) == 0
    assert len(one.blocks) == 2
    computed(blocks, one)
    for token in (6, 7):  # still in the second block
        one.token_ids.append(token)
        blocks.append(one)
    assert len(one.blocks) == 2
    one.token_ids.append(8)
    assert blocks.may_append(one)
    blocks.append(one)
    assert len(one.blocks) == 3
    check(blocks, [one])
    big = sequence(list(range(100, 108)))
    assert not blocks.can_allocate(big)
    blocks.deallocate(one)
    assert blocks.can_allocate(big, spare=2)
    assert not blocks.can_allocate(big, spare=3)
    check(blocks, [])


def test_a_prefix_is_shared_up_to_the_last_token() -> None:
    blocks = BlockManager(8, 4)
    first = sequence(list(range(12)))
    blocks.allocate(first)
    computed(blocks, first)
    same, longer, other = sequence(list(range(12))), sequence(list(range(13))), sequence([0, 1, 2, 9, 4, 5])
    assert blocks.allocate(same) == 8  # the third block ends with its last token
    assert list(same.blocks[:2]) == list(first.blocks[:2])
    assert blocks.allocate(longer) == 12
    assert blocks.allocate(other) == 0
    check(blocks, [first, same, longer, other])


def test_a_block_counts_only_where_all_before_it_agree() -> None:
    blocks = BlockManager(8, 2)
    first = sequence([1, 2, 3, 4, 5])
    blocks.allocate(first)
    computed(blocks, first)
    assert blocks.cached(sequence([9, 9, 3, 4, 5])) == []
    assert blocks.cached(sequence([1, 2, 9, 9, 5])) == [first.blocks[0]]


def test_salts_do_not_share() -> None:
    blocks = BlockManager(8, 4)
    one = sequence(list(range(9)), b"routers")
    blocks.allocate(one)
    computed(blocks, one)
    assert blocks.cached(sequence(list(range(9)), b"expert 3")) == []
    assert len(blocks.cached(sequence(list(range(9)), b"routers"))) == 2


def test_uncomputed_blocks_are_not_shared() -> None:
    blocks = BlockManager(8, 4)
    one = sequence(list(range(9)))
    blocks.allocate(one)
    one.num_computed = 5
    blocks.share(one)
    assert len(blocks.cached(sequence(list(range(9))))) == 1


def test_freed_blocks_are_reused_until_they_are_needed() -> None:
    blocks = BlockManager(4, 4)
    old, new = sequence([1] * 9), sequence([2] * 5)
    for one in (old, new):
        blocks.allocate(one) if blocks.can_allocate(one) else pytest.fail("no room")
        computed(blocks, one)
        blocks.deallocate(one)
    assert len(blocks.cached(sequence([1] * 9))) == 2  # `new` took the block without a name, and a fresh one
    third = sequence([3] * 5)
    blocks.allocate(third)
    check(blocks, [third])
    assert len(blocks.cached(sequence([1] * 9))) == 1, "the oldest sequence's end goes first"
    assert len(blocks.cached(sequence([2] * 5))) == 1


def test_forgetting() -> None:
    blocks = BlockManager(4, 4)
    one = sequence([1] * 9)
    blocks.allocate(one)
    computed(blocks, one)
    blocks.forget()
    assert blocks.cached(sequence([1] * 9)) == []
    check(blocks, [one])
    blocks.deallocate(one)
    check(blocks, [])


@pytest.mark.parametrize("seed", range(8))
def test_a_random_life(seed: int) -> None:
    draw = random.Random(seed)
    blocks, living = BlockManager(24, draw.choice([1, 2, 4])), []
    hits = 0
    for _ in range(1500):
        match draw.choice(["allocate", "append", "append", "compute", "free", "forget"]):
            case "allocate":
                one = sequence(
                    [draw.randrange(2) for _ in range(draw.randint(1, 12))], draw.choice([b"", b"x"])
                )
                if blocks.can_allocate(one):
                    hits += blocks.allocate(one)
                    assert one.num_computed < len(one) <= len(one.blocks) * blocks.block_size
                    living.append(one)
            case "append" if living:
                one = draw.choice(living)
                one.token_ids.append(draw.randrange(2))
                if blocks.may_append(one):
                    blocks.append(one)
                else:
                    blocks.deallocate(one)
                    living.remove(one)
            case "compute" if living:
                computed(blocks, draw.choice(living))
            case "free" if living:
                blocks.deallocate(living.pop(draw.randrange(len(living))))
            case "forget" if draw.random() < 0.05:
                blocks.forget()
        check(blocks, living)
    assert hits > 0
