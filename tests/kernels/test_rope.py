"""RoPE: megatron-core's `apply_rotary_pos_emb`, in both layouts, partial, interleaved, packed and context-parallel."""

from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from megacpt_kernels.rope import packed_positions, rope, rope_reference
from tests.kernels.compare import FLOATS, TOLERANCE, assert_close, run


def ranks(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def megatrons(x, phases, interleaved=False, cu_seqlens=None, mscale=1.0, group=None) -> torch.Tensor:
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=interleaved, multi_latent_attention=False)
    return apply_rotary_pos_emb(x, phases, config, cu_seqlens, mscale, group or ranks(1, 0))


def phases_of(places: int, width: int, device: str, interleaved: bool = False) -> torch.Tensor:
    angles = torch.outer(torch.arange(places).float(), 10000.0 ** (-torch.arange(0, width, 2) / width))
    whole = torch.stack((angles, angles), -1).flatten(1) if interleaved else torch.cat((angles, angles), -1)
    return whole[:, None, None].to(device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "width"), [((1, 1, 1, 2), 2), ((5, 2, 3, 20), 20), ((7, 1, 5, 26), 12)])
def test_it_is_megatrons(
    device: str,
    shape: tuple[int, ...],
    width: int,
    dtype: torch.dtype,
    interleaved: bool,
    small_launches: None,
) -> None:
    phases = phases_of(shape[0] + 2, width, device, interleaved)
    inputs = [torch.randn(shape, device=device).to(dtype)]
    expected = run(lambda x: megatrons(x, phases[: shape[0]], interleaved, mscale=1.2), inputs)
    for function in (rope, rope_reference):
        results = run(lambda x, of=function: of(x, phases, interleaved=interleaved, mscale=1.2), inputs)
        assert_close(results, expected, TOLERANCE[dtype])


def test_phases_may_differ_within_a_pair(device: str, small_launches: None) -> None:
    phases, inputs = torch.randn(4, 1, 1, 10, device=device), [torch.randn(4, 2, 3, 12, device=device)]
    for interleaved in (False, True):
        expected = run(lambda x, flag=interleaved: megatrons(x, phases, flag), inputs)
        assert_close(run(lambda x, flag=interleaved: rope(x, phases, interleaved=flag), inputs), expected, 1e-5)


def test_each_sample_may_have_its_own_phases(device: str, small_launches: None) -> None:
    phases, inputs = torch.randn(5, 2, 1, 10, device=device), [torch.randn(4, 2, 3, 12, device=device)]
    expected = run(lambda x: megatrons(x, phases[:4]), inputs)
    for function in (rope, rope_reference):
        assert_close(run(lambda x, of=function: of(x, phases), inputs), expected, 1e-5)


@pytest.mark.parametrize("width", [12, 8])
def test_in_place_writes_over_its_input_and_has_the_same_gradient(device: str, width: int) -> None:
    phases, x = phases_of(6, width, device), torch.randn(6, 2, 3, 12, device=device)
    expected = run(lambda x: rope(x, phases), [x])
    assert_close(run(lambda x: rope(x, phases, in_place=True), [x]), expected, 1e-6)
    copy = x.clone()
    assert rope(copy, phases, in_place=True) is copy
    assert_close([copy], expected[:1], 1e-6)


def test_the_query_of_a_fused_projection_is_read_where_it_lies(device: str) -> None:
    mixed, phases = torch.randn(5, 2, 3, 60, device=device), phases_of(5, 20, device)
    for view in (mixed[..., 20:40], mixed[..., ::3], mixed.transpose(0, 1)[:, :1, :, :20]):
        assert torch.equal(rope(view, phases), rope(view.contiguous(), phases))


@pytest.mark.parametrize("lengths", [[4], [8, 4, 12], [4, 4, 4, 20]])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("restart", [True, False])
def test_packed_documents_are_megatrons(device: str, lengths: list[int], size: int, rank: int, restart: bool) -> None:
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
    # Megatron counts from 0 in each document unless there are exactly as many phases as tokens.
    phases = phases_of(total + restart, 10, device)
    positions = packed_positions(cu_seqlens, total // size, cp_rank=rank, cp_size=size, restart=restart)
    inputs = [torch.randn(total // size, 3, 12, device=device)]
    expected = run(lambda x: megatrons(x, phases, cu_seqlens=cu_seqlens, group=ranks(size, rank)), inputs)
    for function in (rope, rope_reference):
        assert_close(run(lambda x, of=function: of(x, phases, positions), inputs), expected, 1e-5)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any),
    st.integers(1, 3),
    st.integers(0, 5),
    st.booleans(),
)
def test_positions_of_all_ranks_are_each_place_of_each_document_once(
    parts: list[int], size: int, behind: int, restart: bool
) -> None:
    lengths = [part * 2 * size for part in parts]
    starts = [0, *accumulate(lengths)]
    dealt = []
    for rank in range(size):
        here = starts[-1] // size
        positions = packed_positions(torch.tensor(starts), here + behind, cp_rank=rank, cp_size=size, restart=restart)
        assert positions[here:].tolist() == [0] * behind
        expected = []
        for start, part in zip(starts, parts, strict=False):
            for number in (rank, 2 * size - 1 - rank):
                expected += [number * part + i + (0 if restart else start) for i in range(part)]
        assert positions[:here].tolist() == expected
        dealt += expected
    whole = [
        i + (0 if restart else start) for start, length in zip(starts, lengths, strict=False) for i in range(length)
    ]
    assert sorted(dealt) == sorted(whole)


def test_tokens_behind_the_last_document_have_position_0() -> None:
    assert packed_positions(torch.tensor([0, 2, 5]), 8).tolist() == [0, 1, 0, 1, 2, 0, 0, 0]
    assert packed_positions(torch.tensor([0, 2, 2, 5]), 5).tolist() == [0, 1, 0, 1, 2]


def test_far_positions(device: str) -> None:
    places = torch.tensor([0, 1_000, 131_071, 1_000_000], device=device)
    phases = (places[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], device=device))[:, None, None]
    inputs = [torch.randn(4, 1, 2, 4, device=device)]
    assert_close(run(lambda x: rope(x, phases), inputs), run(lambda x: megatrons(x, phases), inputs), 1e-5)


@pytest.mark.parametrize(
    ("shape", "phases", "positions", "message"),
    [
        ((4, 2), (4, 1, 1, 2), None, r"takes \[s, b, h, d\]"),
        ((4, 2, 2, 8), (4, 3, 1, 8), None, "equal for all heads"),
        ((4, 2, 2, 8), (4, 1, 1, 10), None, "at most a head's 8"),
        ((4, 2, 2, 8), (3, 1, 1, 8), None, "have 3 places"),
        ((4, 2, 8), (3, 1, 1, 8), 3, "positions are"),
    ],
)
def test_what_does_not_belong_together_is_refused(shape, phases, positions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(torch.ones(shape), torch.ones(phases), None if positions is None else torch.arange(positions))
