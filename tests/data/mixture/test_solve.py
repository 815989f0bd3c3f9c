from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.mixture.mixture import Budget, Mixture, Source, Start
from megacpt.data.mixture.order import samples_per_pass
from megacpt.data.mixture.solve import apportion, solve
from megacpt.errors import UserError

MEDICAL = Source("medical", documents=10, tokens=1001, epochs=2)
GENERAL = Source("general", documents=20, tokens=5001, weight=0.2)


def sequence(mixture: Mixture, start: int, stop: int) -> list[tuple[str, int]]:
    """The samples of a stretch as (source, sample of that source's own sequence of passes)."""
    located = [mixture.locate(k) for k in range(start, stop)]
    sizes = [draw.size for draw in mixture.segments[0].draws]
    return [(mixture.sources[source].name, number * sizes[source] + row) for source, number, row in located]


@st.composite
def epoch_sources(draw: st.DrawFn) -> list[Source]:
    """At least one source with epochs, and weights that sum to less than 1."""
    tokens = st.integers(2, 300)
    epochs = draw(st.lists(st.tuples(tokens, st.integers(1, 4)), min_size=1, max_size=4))
    weights = draw(st.lists(st.tuples(tokens, st.integers(0, 24)), max_size=4))
    sources = [Source(f"e{i}", 1, t, epochs=e) for i, (t, e) in enumerate(epochs)]
    sources += [Source(f"w{i}", 1, t, weight=w / 100) for i, (t, w) in enumerate(weights)]
    return draw(st.permutations(sources))


@given(epoch_sources(), st.integers(1, 20), st.integers(1, 16), st.integers(0, 9))
def test_epochs_are_exact_and_weights_are_shares(sources: list[Source], seq_length: int, batch: int, seed: int):
    mixture = solve(sources, seq_length, batch, seed)
    whole = mixture.samples
    of_epochs = sum(s.epochs * samples_per_pass(s.tokens, seq_length) for s in sources if s.epochs)
    ideal = of_epochs / (1 - sum(Fraction(str(s.weight)) for s in sources if s.weight))
    assert abs(whole - ideal) <= Fraction(1, 2)
    for source, count in zip(sources, mixture.counts, strict=True):
        if source.epochs:
            assert count == source.epochs * samples_per_pass(source.tokens, seq_length)
        else:
            assert abs(count - whole * Fraction(str(source.weight))) < 2
    seen = sequence(mixture, 0, whole)
    for source, count in zip(sources, mixture.counts, strict=True):
        assert [j for name, j in seen if name == source.name] == list(range(count))


@given(epoch_sources(), st.integers(1, 20), st.integers(1, 16))
def test_the_last_batch_goes_on_with_the_largest_source(sources: list[Source], seq_length: int, batch: int):
    mixture = solve(sources, seq_length, batch, 3)
    assert 0 <= mixture.steps * batch - mixture.samples < batch
    most = max(mixture.counts)
    name = min(s.name for s, count in zip(sources, mixture.counts, strict=True) if count == most)
    fill = sequence(mixture, mixture.samples, mixture.steps * batch)
    assert fill == [(name, most + i) for i in range(len(fill))]


@given(epoch_sources(), st.integers(0, 60))
def test_counts_agree_with_single_samples(sources: list[Source], begin: int):
    mixture = solve(sources, 7, 8, 1, start=Start(begin, {"w0": 3, "former": 5}))
    span = range(begin, begin + mixture.samples + 20)
    consumed = Counter({"w0": 3, "former": 5})
    for k in span:
        assert {name: n for name, n in mixture.consumed(k).items() if n} == consumed
        consumed[mixture.sources[mixture.locate(k)[0]].name] += 1
    with pytest.raises(IndexError):
        mixture.locate(begin - 1)


def test_the_sequence_depends_on_neither_batch_size_nor_early_stop_nor_order_of_declaration():
    whole = solve([MEDICAL, GENERAL], 10, 1, 5)
    expected = sequence(whole, 0, whole.samples)
    for sources, batch, budget in [
        ([MEDICAL, GENERAL], 16, None),
        ([MEDICAL, GENERAL], 8, Budget(train_iters=3)),
        ([GENERAL, MEDICAL], 7, None),
    ]:
        assert sequence(solve(sources, 10, batch, 5, budget), 0, whole.samples) == expected
    assert any(sequence(solve([MEDICAL, GENERAL], 10, 1, seed), 0, whole.samples) != expected for seed in range(20))


@given(st.lists(st.floats(0, 10, allow_subnormal=False), min_size=1, max_size=6).filter(lambda w: max(w) > 0.01))
def test_weights_alone_follow_their_shares_and_a_longer_run_begins_alike(weights: list[float]):
    sources = [Source(f"s{i}", 1, 100, weight=w) for i, w in enumerate(weights)]
    short, long = (solve(sources, 10, 8, 1, Budget(train_iters=n)) for n in (20, 50))
    assert sequence(short, 0, 200) == sequence(long, 0, 200)
    assert short.fingerprint() == long.fingerprint()
    for weight, count in zip(weights, long.counts, strict=True):
        assert abs(count - 400 * weight / sum(weights)) <= 3.001


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (Budget(train_iters=5), 5),
        (Budget(train_samples=41), 6),
        (Budget(train_tokens=400), 5),
        (Budget(train_tokens=401), 6),
    ],
)
def test_budgets_are_rounded_up_to_whole_batches(budget: Budget, steps: int):
    mixture = solve([replace(GENERAL, weight=1.0)], 10, 8, 1, budget)
    assert (mixture.steps, mixture.samples, mixture.stop) == (steps, 8 * steps, 8 * steps)
    assert solve([MEDICAL, GENERAL], 10, 8, 1, budget).steps == steps


@given(st.integers(0, 10**6), st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any))
def test_apportion_sums_and_stays_within_one(total: int, weights: list[int]):
    parts = apportion(total, [Fraction(w) for w in weights])
    assert sum(parts) == total
    assert all(abs(part - Fraction(total * w, sum(weights))) < 1 for part, w in zip(parts, weights, strict=True))


def test_decimals_are_meant_as_written():
    sources = [MEDICAL, *(replace(GENERAL, name=f"g{w}", weight=w) for w in (0.1, 0.2, 0.3))]
    mixture = solve(sources, 10, 1, 1)
    assert (mixture.samples, mixture.counts) == (500, (200, 50, 100, 150))


@pytest.mark.parametrize(
    ("sources", "budget", "message"),
    [
        ([replace(MEDICAL, epochs=None)], None, r"sources\.medical: neither epochs nor weight"),
        ([replace(MEDICAL, weight=0.5)], None, r"sources\.medical: both epochs and weight"),
        ([replace(MEDICAL, epochs=0)], None, r"medical: epochs 0 .* at least 1"),
        ([replace(MEDICAL, epochs=1.5)], None, r"medical: epochs 1\.5 .* whole number"),
        ([replace(MEDICAL, epochs=True)], None, r"medical: epochs True"),
        ([MEDICAL, replace(GENERAL, weight=-0.1)], None, r"general: weight -0\.1"),
        ([MEDICAL, replace(GENERAL, weight=float("nan"))], None, r"general: weight nan"),
        ([MEDICAL, replace(GENERAL, weight=1.0)], None, r"weights sum to 1, "),
        ([MEDICAL, *(replace(GENERAL, name=f"g{w}", weight=w) for w in (0.1, 0.2, 0.7))], None, r"weights sum to 1, "),
        ([GENERAL], None, r"set one of train_iters, train_samples, train_tokens"),
        ([replace(GENERAL, weight=0.0)], Budget(train_iters=5), r"every weight is 0"),
        ([GENERAL], Budget(train_iters=5, train_tokens=7), r"train_iters and train_tokens are both set"),
        ([GENERAL], Budget(train_iters=0), r"train\.train_iters: 0 is not"),
        ([MEDICAL, GENERAL], Budget(train_iters=33), r"33 iterations, but the mixture holds 32 of 8 samples"),
        ([MEDICAL, replace(GENERAL, tokens=1)], None, r"general: the corpus has 20 documents with 1 tokens"),
        ([MEDICAL, MEDICAL], None, r"each name once"),
        ([], None, r"at least one source"),
    ],
)  # fmt: skip
def test_mistakes_are_named(sources: list[Source], budget: Budget | None, message: str):
    with pytest.raises(UserError, match=message):
        solve(sources, 10, 8, 1, budget)


def test_a_source_cannot_have_fewer_epochs_than_it_has_seen():
    with pytest.raises(UserError, match=r"medical: 2 epochs are 200 samples, but 201 are consumed"):
        solve([MEDICAL, GENERAL], 10, 8, 1, start=Start(300, {"medical": 201}))
    with pytest.raises(UserError, match="every epoch"):
        solve([MEDICAL, GENERAL], 10, 8, 1, start=Start(300, {"medical": 200}))
    with pytest.raises(UserError, match="80 samples, but 300 are consumed"):
        solve([GENERAL], 10, 8, 1, Budget(train_iters=10), Start(300, {"general": 300}))
    with pytest.raises(UserError, match="296 samples, but 300 are consumed"):
        solve([MEDICAL, GENERAL], 10, 8, 1, Budget(train_iters=37), Start(300, {"medical": 100}))
    other = replace(MEDICAL, name="other")
    assert solve([MEDICAL, other], 10, 8, 1, start=Start(300, {"medical": 200})).counts == (0, 200)
