from dataclasses import replace

from megacpt.data.mixture.ledger import table
from megacpt.data.mixture.mixture import Budget, Source, Start
from megacpt.data.mixture.solve import solve

MEDICAL = Source("medical", documents=1300, tokens=1_234_567, epochs=2)
GENERAL = Source("general", documents=9876, tokens=4_000_000, weight=0.18)


def test_the_table():
    assert table(solve([MEDICAL, GENERAL], 256, 8, 1234)).splitlines() == [
        "source   documents     tokens  samples/pass  samples    share  epochs",
        "─" * 69,
        "medical      1,300  1,234,567         4,823    9,646   82.00%       2",
        "general      9,876  4,000,000        15,625    2,117   18.00%    0.14",
        "─" * 69,
        "total       11,176  5,234,567                 11,763  100.00%",
        "steps: 1,471 of 8 samples x 256 tokens",
        "last batch: filled with 5 samples of the next pass over medical",
    ]


def test_the_table_tells_of_an_early_stop_instead_of_the_fill():
    assert table(solve([MEDICAL, GENERAL], 256, 8, 1234, Budget(train_iters=500))).splitlines()[6:] == [
        "steps: 1,471 of 8 samples x 256 tokens",
        "stops early after step 500, at epochs: medical 0.68, general 0.05",
        "last batch: full",
    ]


def test_the_table_tells_of_a_takeover_and_of_unused_sources():
    start = Start(4000, {"medical": 3280, "general": 720})
    sources = [replace(MEDICAL, epochs=1), replace(GENERAL, weight=0.5), replace(GENERAL, name="off", weight=0.0)]
    lines = table(solve(sources, 256, 8, 1234, start=start)).splitlines()
    assert lines[2].split()[-3:] == ["1,543", "50.00%", "1"]
    assert lines[7:] == [
        "begins at sample 4,000 of the run, after medical 3,280, general 720; epochs include these",
        "steps: 886 of 8 samples x 256 tokens",
        "last batch: filled with 2 samples of the next pass over general",
        "no sample of: off",
    ]


def test_the_run_ends_with_the_batch_that_reaches_stop():
    whole = solve([MEDICAL, GENERAL], 256, 8, 1234)
    assert (whole.samples, whole.stop, whole.steps) == (11_763, 11_763, 1471)
    assert solve([MEDICAL, GENERAL], 256, 8, 1234, Budget(train_iters=3)).stop == 24
