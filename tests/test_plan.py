"""The plan of a streamed merge, in literal integers."""

from __future__ import annotations

import random

import pytest

from m3jax.engine.plan import (
    TILE,
    Chunk,
    Item,
    Run,
    blocks,
    chunk_tiles,
    cut,
    natural_order,
    sample,
    split_shards,
    whole,
)

BF16, F32 = ("BF16",), ("F32",)


def test_a_tensor_is_cut_into_chunks():
    assert cut([Item(5 * TILE + 7, BF16)], [0], tiles=2) == [
        Chunk(BF16, True, (Run(0, 0, 2 * TILE, 0),)),
        Chunk(BF16, True, (Run(0, 2 * TILE, 2 * TILE, 0),)),
        Chunk(BF16, True, (Run(0, 4 * TILE, TILE + 7, 0),)),
    ]


def test_small_tensors_share_a_chunk():
    items = [Item(10, BF16), Item(TILE + 1, BF16), Item(1, BF16)]
    assert cut(items, [0, 1, 2], tiles=4) == [
        Chunk(BF16, True, (Run(0, 0, 10, 0), Run(1, 0, TILE + 1, 1), Run(2, 0, 1, 3)))
    ]
    assert cut(items, [2, 1], tiles=2) == [
        Chunk(BF16, True, (Run(2, 0, 1, 0), Run(1, 0, TILE, 1))),
        Chunk(BF16, True, (Run(1, TILE, 1, 0),)),
    ]


def test_other_dtypes_and_copies_have_chunks_of_their_own():
    items = [Item(1, BF16), Item(1, F32), Item(1, F32, merged=False), Item(0, BF16)]
    assert cut(items, [0, 1, 2, 3], tiles=8) == [
        Chunk(BF16, True, (Run(0, 0, 1, 0),)),
        Chunk(F32, True, (Run(1, 0, 1, 0),)),
        Chunk(F32, False, (Run(2, 0, 1, 0),)),
    ]


def test_groups_of_whole_tensors():
    sizes = [3 * TILE, TILE, 1, 5 * TILE + 1, 2 * TILE, TILE, TILE]
    items = [Item(size, ("F32",)) for size in sizes]
    items[5] = Item(TILE, ("F64",))
    groups = whole(items, range(7), 4)
    assert [{run.item for c in g for run in c.runs} for g in groups] == [
        {0, 1},
        {2},
        {3},
        {4},
        {5},
        {6},
    ]
    assert [len(group) for group in groups] == [1, 1, 2, 1, 1, 1]


def test_the_last_block_of_rows_is_smaller():
    item = Item(7 * 100, ("F32",), shape=(7, 10, 10))
    chunks = blocks([item], [0], 300, "row")
    assert [chunk.block for chunk in chunks] == [(30, 10), (30, 10), (10, 10)]
    assert [chunk.elements for chunk in chunks] == [300, 300, 100]


def test_nothing_to_cut():
    assert cut([], [], tiles=1) == []
    assert cut([Item(0, BF16)], [0], tiles=1) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_element_once(seed: int):
    generator = random.Random(seed)
    items = [
        Item(
            generator.choice(
                [0, 1, TILE - 1, TILE, TILE + 1, generator.randrange(9999)]
            ),
            generator.choice([BF16, F32]),
            generator.random() < 0.8,
        )
        for _ in range(12)
    ]
    order = generator.sample(range(12), 9)
    tiles = generator.randint(1, 9)
    covered: dict[int, int] = dict.fromkeys(order, 0)
    place = 0
    for chunk in cut(items, order, tiles):
        row = 0
        for run in chunk.runs:
            assert (chunk.signature, chunk.merged) == (
                items[run.item].signature,
                items[run.item].merged,
            )
            assert run.row == row, "runs stand tile behind tile"
            assert run.start == covered[run.item], "in order"
            assert run.start % TILE == 0, "so that a tile starts a block of masks"
            assert run.elements == slice(row * TILE, row * TILE + run.count)
            assert order.index(run.item) >= place
            place = order.index(run.item)
            covered[run.item] += run.count
            row += run.rows
        assert 0 < row <= tiles
        assert chunk.elements == sum(run.count for run in chunk.runs)
    assert covered == {index: items[index].size for index in order}


def test_sample_is_spread_evenly():
    items = [Item(100 * TILE + 5, BF16), Item(TILE - 1, BF16), Item(60 * TILE, F32)]
    chunks = sample(items, [0, 1, 2], tiles=6, wanted=16)
    taken = [(run.item, run.start // TILE) for chunk in chunks for run in chunk.runs]
    assert taken == [(0, tile) for tile in range(5, 100, 10)] + [
        (2, tile) for tile in range(5, 60, 10)
    ]
    assert all(run.count == TILE for chunk in chunks for run in chunk.runs)
    assert [len(chunk.runs) for chunk in chunks] == [6, 4, 6]
    assert [chunk.signature for chunk in chunks] == [BF16, BF16, F32]
    assert [run.row for run in chunks[0].runs] == [0, 1, 2, 3, 4, 5]


def test_sample_does_not_depend_on_chunks():
    items = [Item(77 * TILE, BF16), Item(9 * TILE, F32), Item(50 * TILE, BF16)]

    def taken(tiles: int) -> list[tuple[int, int]]:
        chunks = sample(items, [0, 1, 2], tiles, wanted=20)
        return [(run.item, run.start) for chunk in chunks for run in chunk.runs]

    assert taken(1) == taken(3) == taken(1000)


def test_sample_of_little():
    assert sample([Item(TILE - 1, BF16)], [0], tiles=4, wanted=8) == []
    few = sample([Item(3 * TILE, BF16)], [0], tiles=4, wanted=8)
    assert [run.start for run in few[0].runs] == [0, TILE, 2 * TILE]


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [
        ([], 10, [[]]),
        ([4, 4, 2], 10, [[0, 1, 2]]),
        ([4, 4, 3], 10, [[0, 1], [2]]),
        ([20, 1, 9, 1], 10, [[0], [1, 2], [3]]),
        ([1, 20, 1], 10, [[0], [1], [2]]),
        ([0, 0], 10, [[0, 1]]),
        ([5, 0, 5, 0], 5, [[0, 1], [2, 3]]),
    ],
)
def test_shards(sizes, limit, shards):
    assert split_shards(sizes, limit) == shards


def test_layers_are_in_order_of_their_numbers():
    names = [
        "model.layers.10.a.weight",
        "model.layers.9.b.weight",
        "lm_head.weight",
        "model.layers.9.a.weight",
        "model.embed_tokens.weight",
        "h.2",
        "h.10",
    ]
    assert sorted(names, key=natural_order) == [
        "h.2",
        "h.10",
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.9.a.weight",
        "model.layers.9.b.weight",
        "model.layers.10.a.weight",
    ]


@pytest.mark.parametrize(
    ("chunk_size", "bytes_per_element", "devices", "budget", "tiles"),
    [
        (1024, 6, 1, 0, 1),
        (1024, 6, 8, 0, 8),  # no less than a tile for each device
        (8 << 20, 6, 1, 0, 8192),
        (5000, 6, 1, 0, 4),
        (5000, 6, 3, 0, 6),
        (None, 6, 1, 32 << 20, 2048),
        (None, 6, 6, 32 << 20, 2052),
        (None, 64, 1, 32 << 20, 512),
        (None, 1000, 1, 1, 1),
    ],
)
def test_chunk_sizes(chunk_size, bytes_per_element, devices, budget, tiles):
    assert chunk_tiles(chunk_size, bytes_per_element, devices, budget) == tiles


@pytest.mark.parametrize("chunk_size", [0, 1023, -1, (64 << 20) + 1])
def test_chunk_size_out_of_range(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size={chunk_size} needs 1024 to"):
        chunk_tiles(chunk_size, 6, 1, 1 << 20)
