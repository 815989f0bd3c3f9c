"""The likeliest token over a vocabulary that is cut over ranks: ties go to the lowest id, padding is never chosen."""

import torch

from tests.ranks import run_ranks

REAL = 5


def likeliest(logits: torch.Tensor, world: int) -> torch.Tensor:
    import torch.distributed as dist

    from megacpt.model.score import likeliest_tokens
    from megacpt.runtime.setup import Layout, setup

    setup(Layout(world, world, 1, None, 1), 0, 1)
    rank, rows = dist.get_rank(), logits.shape[-1] // world
    real = min(max(REAL - rank * rows, 0), rows)
    return likeliest_tokens(logits[..., rank * rows : (rank + 1) * rows], real)


def test_ties_and_padding() -> None:
    columns = torch.tensor(
        [
            [0.0, 1, 1, 1, 0, 9, 9, 9],  # a tie over the cut; padding is larger
            [0.0, 0, 0, 0, 2, 9, 9, 9],
            [3.0, 3, 3, 3, 3, 3, 3, 3],
            [-5.0, -9, -9, -9, -9, 0, 0, 0],
            [float("-inf")] * 4 + [-1.0] + [0.0] * 3,
        ]
    )
    for world in (1, 2):
        for found in run_ranks(likeliest, world, columns[None], world):
            assert found.tolist() == [[1, 4, 0, 0, 4]]
    # Of four ranks one has nothing but padding.
    assert run_ranks(likeliest, 4, columns[None], 4)[3].tolist() == [[1, 4, 0, 0, 4]]
