"""Where a rank continues reading, from the positions that a checkpoint keeps for every rank.

With the same number of ranks each continues at its own position. With another number, reading continues after everything
that any rank has read: what the others had not read of it is skipped, so that nothing is trained on twice.
"""

from collections.abc import Sequence

TextPosition = tuple[int, int, int, int]  # epoch, row group, document in it, token of that document
START: TextPosition = (0, -1, 0, 0)  # row group −1: the rank's first


def text_position(positions: Sequence[TextPosition], rank: int, world_size: int, row_groups: int) -> TextPosition:
    """Of a TokenStream over `row_groups` row groups. With another number of ranks, row groups read in part are skipped."""
    if len(positions) == world_size:
        return positions[rank]
    epoch, furthest = max((p[0], p[1]) for p in positions)
    row_group = furthest + 1 + (rank - furthest - 1) % world_size
    if row_group >= row_groups:
        return (epoch + 1, rank, 0, 0)
    return (epoch, row_group, 0, 0)


def conversation_position(positions: Sequence[tuple[int, ...]], rank: int, world_size: int) -> tuple[int, ...]:
    """Of packed_batches, (conversations read, tokens of the next one), or of padded_batches, (conversations read,)."""
    if len(positions) == world_size:
        return tuple(positions[rank])
    furthest = max(p[0] + (len(p) > 1 and p[1] > 0) for p in positions)
    return (-(-furthest * len(positions) // world_size), 0)[: len(positions[0])]
