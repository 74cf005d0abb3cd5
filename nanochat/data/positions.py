"""Where a rank continues to read, from the positions of all ranks that a checkpoint stores.

With the same number of ranks, each continues at its own position. With another number, all continue behind the furthest
position: data before it that some rank had not read yet are skipped, so that no data are trained on twice.
"""

from collections.abc import Sequence

TextPosition = tuple[int, int, int, int]  # epoch, row group, document in it, token of that document
START: TextPosition = (0, -1, 0, 0)  # row group −1: the rank's first


def text_position(positions: Sequence[TextPosition], rank: int, world_size: int, row_groups: int) -> TextPosition:
    """This rank's position in a TokenStream over `row_groups` row groups.

    With another number of ranks, row groups that were partly read are skipped.
    """
    if len(positions) == world_size:
        return positions[rank]
    epoch, furthest = max((p[0], p[1]) for p in positions)
    row_group = furthest + 1 + (rank - furthest - 1) % world_size
    if row_group >= row_groups:
        return (epoch + 1, rank, 0, 0)
    return (epoch, row_group, 0, 0)


def conversation_position(positions: Sequence[tuple[int, ...]], rank: int, world_size: int) -> tuple[int, ...]:
    """This rank's position in packed_batches or padded_batches.

    It is (conversations read, tokens read of the next one) for packed batches and (conversations read,) for padded ones.
    """
    if len(positions) == world_size:
        return tuple(positions[rank])
    furthest = max(p[0] + (len(p) > 1 and p[1] > 0) for p in positions)
    return (-(-furthest * len(positions) // world_size), 0)[: len(positions[0])]
