import pytest

from megacpt.bench.kernel_cases import gpu_cases
from megacpt.bench.rows import ON_GPU, OURS, TIME_UP, Recorder, append, read, write_readme
from megacpt.bench.train_case import GPU_CASES


def recorder(run, rows):
    made = Recorder("a device", [], run, "abc")
    for row in rows:
        made.add("train", *row)
    return made.rows


def test_rows_come_back_and_the_readme_tells_the_newest_run(tmp_path):
    old = recorder("2026-01-01 10:00", [("case", OURS, 1, "MB/s"), ("case", "peer", 5, "MB/s")])
    new = recorder("2026-01-02 10:00", [("case", OURS, 8, "MB/s", "a note"), ("case", "peer", 2, "MB/s")])
    append(tmp_path / "train.csv", old)
    append(tmp_path / "train.csv", new)
    assert read(tmp_path / "train.csv") == old + new
    write_readme(tmp_path)
    told = (tmp_path / "README.md").read_text()
    assert "| peer | 2.0 | MB/s | 4x |  |" in told
    assert "5.0" not in told


@pytest.mark.parametrize(
    ("unit", "ratio"),
    [("MB/s", "4x"), ("GB/s saved", "4x"), ("% of the matmul rate", "4x"), ("us", "0.25x"), ("GiB peak", "0.25x")],
)
def test_how_many_times_better(tmp_path, unit, ratio):
    append(tmp_path / "train.csv", recorder("r", [("case", OURS, 8, unit), ("case", "peer", 2, unit)]))
    write_readme(tmp_path)
    assert f"| peer | 2.0 | {unit} | {ratio} |  |" in (tmp_path / "README.md").read_text()


def test_the_readme_names_what_no_gpu_has_measured(tmp_path):
    cases = [("kernels", case.name) for case in gpu_cases()] + [
        ("train", case.title.split(", ")[0]) for case in GPU_CASES.values()
    ]
    assert list(dict.fromkeys(cases)) == list(ON_GPU)
    on_gpu, on_cpu = (Recorder(device, [], "r", "abc", tmp_path) for device in ("NVIDIA H200", "AMD, 2 cores"))
    on_cpu.add("train", "smollm2-135m, fp32", OURS, 100, "tokens/s")
    on_gpu.add("train", "llama3.2-1b, bf16", OURS, 0, "tokens/s", TIME_UP)
    on_gpu.add("kernels", "RoPE, 8,192 x 32 x 128, bfloat16, forward", OURS, 9, "us")
    write_readme(tmp_path)
    told = (tmp_path / "README.md").read_text()
    assert {of for of in ON_GPU if f"| {of[0]} | {of[1]} | not measured |" in told} == {*ON_GPU} - {("kernels", "RoPE")}


def test_a_peer_without_a_speed_has_no_ratio(tmp_path):
    append(tmp_path / "train.csv", recorder("r", [("case", OURS, 8, "MB/s"), ("case", "peer", 0, "MB/s", "failed")]))
    write_readme(tmp_path)
    assert "| peer | 0.0 | MB/s |  | failed |" in (tmp_path / "README.md").read_text()


def test_a_run_without_time_for_a_case_leaves_what_an_earlier_one_has_measured(tmp_path):
    late = [("case", OURS, 0, "MB/s", TIME_UP), ("other", OURS, 3, "MB/s"), ("other", "peer", 0, "MB/s", TIME_UP)]
    append(
        tmp_path / "train.csv", recorder("2026-01-01 10:00", [("case", OURS, 1, "MB/s"), ("other", OURS, 2, "MB/s")])
    )
    append(tmp_path / "train.csv", recorder("2026-01-02 10:00", late))
    write_readme(tmp_path)
    told = [line for line in (tmp_path / "README.md").read_text().splitlines() if "| MB/s |" in line]
    assert [line.split(" | ")[1] for line in told] == ["1.0", "3.0", "0.0"]
