"""The scheduler without a model: budgets, order, preemption, and random traffic in which everything ends."""

import random

import pytest

from octad.engine.block_manager import BlockManager
from octad.engine.outputs import RequestMetrics
from octad.engine.params import SamplingParams
from octad.engine.scheduler import Piece, Scheduler
from octad.engine.sequence import Request, Sequence


def scheduler(num_blocks: int = 100, seqs: int = 8, tokens: int = 16, block_size: int = 4) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), seqs, tokens)


def request(number: int, length: int, n: int = 1, salt: bytes | None = None) -> Request:
    params = SamplingParams(n=n)
    own = str(number).encode() if salt is None else salt
    prompt = [number * 1000 + i for i in range(length)]
    return Request(str(number), prompt, params, RequestMetrics(0.0), number, own)


def step(it: Scheduler) -> list[tuple[int, int, bool]]:
    """One step in which every sequence that can be sampled gets a token: (request, tokens, sampled) of each piece."""
    pieces = it.schedule()
    it.computed(pieces)
    for piece in pieces:
        if piece.last:
            piece.sequence.token_ids.append(7)
    return [(int(p.sequence.request.request_id), p.count, p.last) for p in pieces]


def test_a_long_prompt_is_cut_and_decoding_goes_first() -> None:
    it = scheduler(tokens=16)
    it.add(request(0, 5))
    assert step(it) == [(0, 5, True)]
    it.add(request(1, 40))
    it.add(request(2, 3))
    assert step(it) == [(0, 1, True), (1, 15, False)]
    assert step(it) == [(0, 1, True), (1, 15, False)]
    assert step(it) == [(0, 1, True), (1, 10, True), (2, 3, True)]
    assert step(it) == [(0, 1, True), (1, 1, True), (2, 1, True)]


def test_places_are_limited_and_service_is_in_order() -> None:
    it = scheduler(seqs=2)
    requests = [request(i, 3) for i in range(4)]
    for one in reversed(requests):  # arrival decides, not when it was added
        it.add(one)
    assert [r for r, _, _ in step(it)] == [0, 1]
    it.finish(requests[0].sequences[0])
    assert [r for r, _, _ in step(it)] == [1, 2]


def test_nobody_overtakes_a_prompt_that_waits_for_blocks() -> None:
    it = scheduler(num_blocks=10, tokens=64)
    first, big, small = request(0, 20), request(1, 24), request(2, 2)
    for one in (first, big, small):
        it.add(one)
    for _ in range(5):
        assert {r for r, _, _ in step(it)} == {0}
    it.finish(first.sequences[0])
    assert step(it) == [(1, 24, True), (2, 2, True)]


def test_the_youngest_gives_way_and_comes_back() -> None:
    it = scheduler(num_blocks=6, tokens=64)
    old, young = request(0, 8), request(1, 8)
    it.add(old)
    it.add(young)
    assert step(it) == [(0, 8, True), (1, 8, True)]
    for _ in range(4):  # each takes its third block
        assert step(it) == [(0, 1, True), (1, 1, True)]
    assert step(it) == [(0, 1, True)]
    assert it.preemptions == 1
    assert [s.order for s in it.waiting] == [(1, 0)]
    assert young.sequences[0].num_computed == 0
    it.finish(old.sequences[0])
    back = it.schedule()  # 8 of the prompt and 5 of the answer; what is still cached need not be computed
    assert [p.sequence for p in back] == [young.sequences[0]]
    assert back[0].start + back[0].count == 13
    assert back[0].last


def test_answers_share_their_prompts_full_blocks() -> None:
    it = scheduler(tokens=64)
    it.add(request(0, 10, n=3))
    assert step(it) == [(0, 10, True)]
    assert step(it) == [(0, 1, True), (0, 2, True), (0, 2, True)]
    assert it.prefix_hit_tokens == 16
    blocks = [list(s.blocks[:2]) for s in it.running]
    assert blocks[0] == blocks[1] == blocks[2]
    assert len({s.blocks[2] for s in it.running}) == 3


def test_a_waiting_answer_does_not_block_others() -> None:
    it = scheduler(tokens=16)
    it.add(request(0, 30, n=2))
    it.add(request(1, 3))
    step(it)
    assert step(it) == [(0, 14, True), (1, 2, False)]


def test_finishing_a_sequence_that_waits() -> None:
    it = scheduler(seqs=1)
    one, two = request(0, 3), request(1, 3)
    it.add(one)
    it.add(two)
    step(it)
    it.finish(two.sequences[0])
    assert not it.waiting
    it.finish(one.sequences[0])
    assert it.schedule() == []
    assert len(it.blocks.free) == it.blocks.num_blocks


class World:
    """Random requests; every step is checked, and every answer must reach its length."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.it = scheduler(
            num_blocks=self.draw.randint(12, 30),
            seqs=self.draw.randint(1, 8),
            tokens=self.draw.choice([3, 8, 64]),
        )
        self.lengths: dict[Sequence, int] = {}
        self.finished = 0
        self.numbers = iter(range(10**6))

    def arrive(self) -> None:
        salt = b"" if self.draw.random() < 0.5 else None
        one = request(next(self.numbers), self.draw.randint(1, 24), self.draw.choice([1, 1, 1, 3]), salt)
        if salt == b"":  # half of the traffic begins alike
            one.prompt[:] = range(len(one.prompt))
            for sequence in one.sequences:
                sequence.token_ids[:] = one.prompt
        for sequence in one.sequences:
            self.lengths[sequence] = len(one.prompt) + self.draw.randint(1, 24)
        self.it.add(one)

    def check(self, pieces: list[Piece]) -> None:
        it, blocks = self.it, self.it.blocks
        assert sum(p.count for p in pieces) <= it.max_tokens
        assert len(it.running) <= it.max_num_seqs
        assert [p.sequence for p in pieces] == list(dict.fromkeys(p.sequence for p in pieces))
        held = [0] * blocks.num_blocks
        for sequence in it.running:
            for block in sequence.blocks:
                held[block] += 1
        assert held == blocks.holders
        assert all(not s.blocks for s in it.waiting)
        assert sorted(it.running, key=lambda s: s.order) == it.running
        assert {*it.running, *it.waiting} == set(self.lengths)
        for p in pieces:
            assert p.sequence in it.running
            assert p.start == p.sequence.num_computed
            assert p.start + p.count <= len(p.sequence.blocks) * blocks.block_size
            written = range(p.start // blocks.block_size, -(-(p.start + p.count) // blocks.block_size))
            assert all(held[p.sequence.blocks[i]] == 1 for i in written), "writes into a block of others"

    def step(self) -> None:
        pieces = self.it.schedule()
        self.check(pieces)
        assert pieces or not self.lengths
        self.it.computed(pieces)
        for piece in pieces:
            sequence = piece.sequence
            if piece.last:
                sequence.token_ids.append(self.draw.randrange(3))
            if len(sequence) >= self.lengths[sequence] or self.draw.random() < 0.01:
                del self.lengths[sequence]
                sequence.finish_reason = "length"
                sequence.request.prompt_computed = True  # an engine aborts a request as a whole
                self.it.finish(sequence)
                self.finished += 1


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic(seed: int) -> None:
    world = World(seed)
    for _ in range(400):
        if world.draw.random() < 0.25:
            world.arrive()
        world.step()
    left = len(world.lengths)
    before = world.finished
    while world.lengths:
        oldest = world.it.running[0] if world.it.running else None
        stood = oldest and oldest.num_computed
        world.step()
        assert oldest not in world.lengths or oldest.num_computed > stood, "the oldest stood still"
    assert world.finished == before + left
    assert len(world.it.blocks.free) == world.it.blocks.num_blocks


def test_random_traffic_preempts_and_reuses() -> None:
    """So that the random test is known to reach what it is for."""
    worlds = [World(seed) for seed in range(12)]
    for world in worlds:
        for _ in range(300):
            if world.draw.random() < 0.25:
                world.arrive()
            world.step()
    assert sum(w.it.preemptions for w in worlds) > 20
    assert sum(w.it.prefix_hit_tokens for w in worlds) > 200
