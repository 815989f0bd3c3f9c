"""Mixtures of several passes, and shares that change within a run, down to the documents."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.data.mixture.continuation import continuation, differences, start_of
from megacpt.data.mixture.ledger import Entry, ledger, ledger_table, table
from megacpt.data.mixture.mixture import Budget, Course, Mixture, Passes, Shift, Source
from megacpt.data.mixture.solve import solve
from megacpt.data.samples.blended import BlendedDataset, Corpus, SourceStream
from megacpt.data.tokens.indexed import IndexedDataset
from megacpt.errors import UserError

Make = Callable[[Sequence[int]], IndexedDataset]
DOMAIN = Source("domain", documents=10, tokens=1001, weight=0.8)
GENERAL = Source("general", documents=20, tokens=5001, weight=0.2, redraw="once")
VOCABULARY = 1 << 20


def passes_of(*sources: Source, samples: int = 50, number: int = 4, batch: int = 8) -> Mixture:
    return solve(sources, 10, batch, 1, course=Course(Passes(samples, number)))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(1, 60), st.integers(1, 5))
def test_every_pass_holds_exactly_its_parts(weights: list[int], samples: int, number: int):
    sources = [Source(f"s{i}", 1, 2000, weight=w / 100) for i, w in enumerate(weights)]
    mixture = passes_of(*sources, samples=samples, number=number)
    counts = [Counter(mixture.locate(k)[0] for k in range(p * samples, (p + 1) * samples)) for p in range(number)]
    assert all(count == counts[0] for count in counts)
    assert mixture.counts == tuple(number * counts[0][i] for i in range(len(weights)))
    for i, weight in enumerate(weights):
        assert abs(counts[0][i] - Fraction(samples * weight, sum(weights))) < 1
    assert (mixture.samples, mixture.ends) == (samples * number, True)
    assert mixture.steps == -(-samples * number // 8)


def test_a_longer_run_begins_as_the_shorter_one_did():
    short, long = (passes_of(DOMAIN, GENERAL, number=n) for n in (2, 5))
    assert [short.locate(k) for k in range(100)] == [long.locate(k) for k in range(100)]
    assert short.fingerprint() == long.fingerprint()
    assert differences(short.fingerprint(), passes_of(DOMAIN, GENERAL, samples=60).fingerprint()) == [
        "pass_samples 50 -> 60"
    ]
    other = passes_of(DOMAIN, replace(GENERAL, redraw="continue"))
    assert differences(short.fingerprint(), other.fingerprint()) == ["source 'general': redraw once -> continue"]


@pytest.mark.parametrize(
    ("sources", "passes", "message"),
    [
        ([replace(DOMAIN, tokens=391)], Passes(40, 2), r"domain: a pass of the mixture takes 400 tokens of it, but it "
         r"has 390 in whole samples, 10 too few; .*domain\.repeat=true"),
        ([replace(DOMAIN, tokens=401)], Passes(40, 2), None),
        ([replace(DOMAIN, tokens=391, repeat=True)], Passes(40, 2), None),
        ([replace(DOMAIN, tokens=391, redraw="continue")], Passes(40, 2), None),
        ([DOMAIN], Passes(0, 2), "a pass is empty"),
        ([replace(DOMAIN, weight=None, epochs=2)], Passes(40, 2), "domain: epochs do not go with passes of a mixture"),
    ],
)  # fmt: skip
def test_a_source_that_is_too_small_is_named(sources: list[Source], passes: Passes, message: str | None):
    if message is None:
        solve(sources, 10, 8, 1, course=Course(passes))
        return
    with pytest.raises(UserError, match=message):
        solve(sources, 10, 8, 1, course=Course(passes))


def corpora_of(corpus: Make, sizes: dict[str, int]) -> dict[str, Corpus]:
    random = np.random.default_rng(0)
    return {name: Corpus.open(corpus(random.integers(0, 25, n).tolist()).prefix) for name, n in sizes.items()}


def mixture_over(corpora: dict[str, Corpus], course: Course, budget: Budget | None = None, **redraw: str) -> Mixture:
    weights = {"domain": 0.8, "general": 0.2}
    sources = [
        Source(n, len(c), c.tokens, c.digest, weight=weights[n], redraw=redraw.get(n, "each_pass"))
        for n, c in corpora.items()
    ]
    return solve(sources, 10, 8, 5, budget, course=course)


def documents_read(blend: BlendedDataset, corpora: dict[str, Corpus], span: range) -> dict[str, Counter[int]]:
    """By source, how often the samples of `span` train on each token (which is its own number)."""
    read: dict[str, Counter[int]] = {name: Counter() for name in corpora}
    for k in span:
        sample = blend.sample(k)
        assert sample.valid.all()
        read[list(corpora)[sample.source]].update(sample.tokens[1:].tolist())
    return read


def test_data_dynamic_and_data_fixed_over_four_passes(corpus: Make):
    """The domain is drawn anew and without repetition in each pass; the general part is the same every time."""
    corpora = corpora_of(corpus, {"domain": 200, "general": 90})
    mixture = mixture_over(corpora, Course(Passes(250, 4)), general="once")
    blend = BlendedDataset(mixture, corpora, VOCABULARY)
    passes = [documents_read(blend, corpora, range(p * 250, (p + 1) * 250)) for p in range(4)]
    for read in passes:
        assert (read["domain"].total(), read["general"].total()) == (2000, 500)
        assert set(read["domain"].values()) == set(read["general"].values()) == {1}
        assert set(read["general"]) == set(passes[0]["general"])
    drawn = [set(read["domain"]) for read in passes]
    assert all(one != other for i, one in enumerate(drawn) for other in drawn[:i])
    orders = [[blend.sample(k).tokens.tolist() for k in range(p * 250, (p + 1) * 250)] for p in range(4)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])


def test_the_fixed_part_stays_the_same_where_weights_change(corpus: Make):
    """With a smaller share it is less of the same documents, with a larger one these and more; also after a resume."""
    corpora = corpora_of(corpus, {"domain": 300, "general": 90})
    shifts = (Shift(250, {"domain": 0.9, "general": 0.1}), Shift(500, {"domain": 0.7, "general": 0.3}))
    mixture = mixture_over(corpora, Course(Passes(250, 4), shifts), general="once")
    begun = mixture.fingerprint()
    resumed = solve(mixture.sources, 10, 8, 5, start=start_of(json.loads(json.dumps(begun))), course=mixture.course)
    assert resumed.fingerprint() == begun
    blend = BlendedDataset(mixture, corpora, VOCABULARY)
    first, second, third, fourth = (
        set(documents_read(blend, corpora, range(p * 250, (p + 1) * 250))["general"]) for p in range(4)
    )
    assert second < first < third == fourth
    changed = solve(mixture.sources, 10, 8, 5, start=mixture.at(500), course=Course(Passes(250, 2)))
    again = BlendedDataset(changed, corpora, VOCABULARY)
    assert set(documents_read(again, corpora, range(500, 750))["general"]) == first


def test_the_ledger_is_what_the_samples_hold(corpus: Make):
    """Against counting tokens one by one: passes of each kind, a repeating source, an early stop inside a pass."""
    corpora = corpora_of(corpus, {"domain": 200, "general": 90})
    for redraw in ("each_pass", "once", "continue"):
        for budget in (None, Budget(train_iters=109)):
            mixture = mixture_over(corpora, Course(Passes(250, 4)), budget, domain=redraw, general=redraw)
            check_ledger(mixture, corpora, 250)
    mixture = mixture_over(corpora, Course(Passes(700, 2)), domain="continue", general="continue")
    check_ledger(mixture, corpora, 700)


def check_ledger(mixture: Mixture, corpora: dict[str, Corpus], size: int) -> None:
    blend = BlendedDataset(mixture, corpora, VOCABULARY)
    entries = ledger(mixture, blend.streams)
    seen: dict[str, set[int]] = {name: set() for name in corpora}
    expected: list[Entry] = []
    bounds = [*range(0, mixture.stop, size), mixture.stop]
    for number, (begin, end) in enumerate(pairwise(bounds), 1):
        for i, (name, found) in enumerate(corpora.items()):
            samples = [s for s in map(blend.sample, range(begin, end)) if s.source == i]
            tokens = sum(int(s.valid.sum()) for s in samples)
            held = {int(t) for s in samples for t in s.tokens[: int(s.valid.sum()) + 1]}
            seen[name] |= held
            ends = np.cumsum(found.dataset.lengths)
            documents = len(set(np.searchsorted(ends, sorted(held), side="right").tolist()))
            share = tokens / ((end - begin) * 10)
            epochs = Fraction(tokens, found.tokens - 1)
            expected.append(Entry(str(number), name, documents, tokens, len(seen[name]), share, epochs))
    assert entries == expected


def test_preparing_shuffles_the_passes_that_are_read_next(corpus: Make):
    corpora = corpora_of(corpus, {"domain": 200, "general": 90})
    blend = BlendedDataset(mixture_over(corpora, Course(Passes(250, 4)), general="once"), corpora, VOCABULARY)
    blend.prepare(610)
    ready = [stream._shuffled.cache_info().currsize for stream in blend.streams]
    for k in range(610, 640):
        blend.sample(k)
    assert ready == [1, 1] == [stream._shuffled.cache_info().misses for stream in blend.streams]


def test_the_ledger_without_passes_is_one_stretch(corpus: Make):
    corpora = corpora_of(corpus, {"domain": 200, "general": 90})
    mixture = mixture_over(corpora, Course(), Budget(train_iters=60))
    streams = [SourceStream(c, n, 10, 5, VOCABULARY) for n, c in corpora.items()]
    entries = ledger(mixture, streams)
    # The domain's last sample of a pass over it is not full.
    assert [(e.name, e.source, e.tokens) for e in entries] == [("all", "domain", 3831), ("all", "general", 960)]
    lines = ledger_table(entries).splitlines()
    assert lines[0].split() == ["pass", "source", "documents", "tokens", "unique", "so", "far", "share", "epochs"]
    assert lines[-1].split() == ["total", "4,791"]


def test_the_table_of_passes():
    assert table(passes_of(DOMAIN, GENERAL)).splitlines() == [
        "source   documents  tokens  tokens/pass    share     redraw  samples  epochs",
        "─" * 76,
        "domain          10   1,001          400   80.00%  each_pass      160    1.60",
        "general         20   5,001          100   20.00%       once       40    0.08",
        "─" * 76,
        "total           30   6,002          500  100.00%                 200",
        "passes: 4 of 50 samples",
        "steps: 25 of 8 samples x 10 tokens",
        "last batch: full",
    ]


def test_shares_change_within_the_run_and_nothing_is_lost():
    shifts = (Shift(80, {"domain": 0.5, "general": 0.5}), Shift(200, {"domain": 0.0, "general": 1.0}))
    mixture = solve([DOMAIN, GENERAL], 10, 8, 1, Budget(train_iters=40), course=Course(shifts=shifts))
    assert [s.samples for s in mixture.segments] == [80, 120, 120]
    assert [s.counts for s in mixture.segments] == [(64, 16), (60, 60), (0, 120)]
    assert mixture.consumed(200) == {"domain": 124, "general": 76}
    places = [mixture.locate(k) for k in range(320)]
    for source, size in ((0, 100), (1, 500)):
        assert [n * size + row for s, n, row in places if s == source] == list(range(mixture.counts[source]))
    text = table(mixture)
    assert "samples 80 to 200, from token 800 on:" in text
    again = solve([DOMAIN, GENERAL], 10, 8, 1, Budget(train_iters=40), start_of(mixture.fingerprint()),
                  Course(shifts=shifts))  # fmt: skip
    assert [again.locate(k) for k in range(320)] == places


def test_shares_change_between_passes():
    shifts = (Shift(100, {"domain": 0.5, "general": 0.5}),)
    mixture = solve([DOMAIN, GENERAL], 10, 8, 1, course=Course(Passes(50, 4), shifts))
    assert [s.counts for s in mixture.segments] == [(80, 20), (50, 50)]
    numbers = {mixture.locate(k)[1] for k in range(100, 200) if mixture.locate(k)[0] == 0}
    assert numbers == {2, 3}


def test_a_takeover_in_the_middle_of_a_pass_draws_anew():
    first = passes_of(DOMAIN, GENERAL)
    at = first.at(120)
    old = json.loads(json.dumps(first.fingerprint()))
    sources = [replace(DOMAIN, weight=0.6), replace(GENERAL, weight=0.4)]
    new = solve(sources, 10, 8, 1, start=continuation(old, first.fingerprint(), at), course=Course(Passes(50, 2)))
    seen, drawn = {first.locate(k) for k in range(120)}, {new.locate(k) for k in range(120, 220)}
    general = {place for place in drawn if place[0] == 1}
    assert not seen & (drawn - general)
    # Drawn once: its ten samples of a pass, and ten more.
    assert len(general) == 20
    assert {place for place in seen if place[0] == 1} < general
    assert new.consumed(220) == {"domain": 96 + 60, "general": 24 + 40}
