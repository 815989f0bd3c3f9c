from importlib.metadata import version
from pathlib import Path

import pytest

from megacpt.data.tokens.versions import installed_version


@pytest.mark.parametrize("name", ["tokenizers", "sentencepiece", "numpy", "orjson"])
def test_the_version_is_the_one_that_importlib_tells(name: str) -> None:
    assert installed_version(name) == version(name)


def test_what_is_not_installed_has_no_version() -> None:
    assert installed_version("no-package-has-this-name") is None


def test_of_two_records_of_one_package_importlib_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("1.0", "2.0"):
        folder = tmp_path / f"twofold-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: twofold\nVersion: {number}\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert installed_version("twofold") == version("twofold")
