"""Hardware by name and by file."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.sim.hardware import Linear, Mocker
from headway.sim.presets import NAMES, STUDY, HardwareError, hardware, read_hardware, write_hardware


@pytest.mark.parametrize("name", NAMES)
def test_presets_are_plausible(name: str) -> None:
    made = hardware(name)
    assert made.name == name
    assert made.cache_tokens > 100_000
    assert made.prefill_s(1000, 0) < made.prefill_s(2000, 0) < made.prefill_s(8000, 0)
    assert 1e-4 < made.step_s(1, 1000) <= made.step_s(64, 64_000) < 0.5
    assert made.predictor.prefill_s(2000, 0) == pytest.approx(made.prefill_s(2000, 0))


def test_the_mocker_is_the_formula_of_the_reference() -> None:
    mocker = Mocker()
    assert mocker.prefill_s(1000, 0) == pytest.approx((4.209989e-7 * 1e6 + 15.18344 + 16.50142) / 1e3)
    assert mocker.step_s(8, 0) == pytest.approx(5.74e-3)
    assert mocker.step_s(8, mocker.cache_tokens // 2) == pytest.approx((-25.74 / 4 + 54.01 / 2 + 5.74) / 1e3)
    assert mocker.prefill_s(0, 500) == 0.0


def test_files_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    write_hardware(path, STUDY)
    assert read_hardware(path) == STUDY == hardware(str(path))
    assert isinstance(hardware(str(path)), Linear)
    path.write_text("{}")
    with pytest.raises(HardwareError, match=r"is no file of headway calibrate .KeyError: 'prefill'"):
        hardware(str(path))
    with pytest.raises(HardwareError, match="'nothing' is neither a file nor one of study, mocker"):
        hardware("nothing")
