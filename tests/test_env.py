import json

import megacpt
from megacpt import env


def test_the_report_names_every_package_and_what_is_missing_of_it(capsys):
    assert env.main([]) == 0
    said = capsys.readouterr().out
    assert f"megacpt {megacpt.__version__}" in said
    for name in env.OPTIONAL:
        assert f"\n{name} " in said
    assert ("no GPU" in said) != ("compute capability" in said)


def test_the_same_for_programs(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    assert env.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["NCCL_DEBUG"] == "WARN"
    assert "hidden" not in str(found)
    assert found["cpu"]["cores"] >= 1
