"""Settings: defaults, TOML, environment and flags, in rising precedence; one clear line for what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from headway.runtime.config import ConfigError, load_config, load_or_exit, option


@dataclass(frozen=True)
class Settings:
    """A made-up service."""

    port: int = option(1, "port")
    rate: float = option(0.5, "100 % of it")
    name: str = option("x", "name")
    loud: bool = option(False, "loud")
    peers: tuple[str, ...] = option((), "peers")
    sizes: tuple[int, ...] = option((), "sizes")
    mode: str = option("a", "mode", choices=("a", "b"))

    def __post_init__(self) -> None:
        if self.port > 65535:
            raise ValueError(f"setting port is {self.port}; it must be at most 65535")


def load(*argv: str, **environ: str) -> Settings:
    return load_config(Settings, "headway-test", argv, environ)


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


def test_defaults() -> None:
    assert load() == Settings()


def test_precedence(tmp_path: Path) -> None:
    path = toml(tmp_path, 'port = 2\nrate = 2\nname = "file"\nloud = true\n')
    settings = load("--config", path, "--port", "4", HEADWAY_TEST_PORT="3", HEADWAY_TEST_NAME="environment")
    assert settings == Settings(port=4, rate=2.0, name="environment", loud=True)


def test_environment_may_name_the_file(tmp_path: Path) -> None:
    path = toml(tmp_path, 'peers = ["a", "b"]\nsizes = [1, 2]\n')
    assert load(HEADWAY_TEST_CONFIG=path) == Settings(peers=("a", "b"), sizes=(1, 2))


def test_other_variables_are_ignored() -> None:
    assert load(HEADWAY_OTHER_THING="1", HOME="/") == Settings()


@pytest.mark.parametrize(("text", "value"), [("true", True), ("1", True), ("YES", True), ("no", False)])
def test_booleans(text: str, value: bool) -> None:
    assert load("--loud", text).loud is value


def test_lists_as_text() -> None:
    assert load("--peers", "a:1,b:2", "--sizes", "3").peers == ("a:1", "b:2")
    assert load("--sizes", "3,4").sizes == (3, 4)


@pytest.mark.parametrize(
    ("argv", "environ", "sentence"),
    [
        (["--port", "x"], {}, "setting port is 'x'; it must be a whole number"),
        (["--port", "1.5"], {}, "setting port is '1.5'; it must be a whole number"),
        (["--rate", "fast"], {}, "setting rate is 'fast'; it must be a number"),
        (["--loud", "maybe"], {}, "setting loud is 'maybe'; it must be true or false"),
        (["--sizes", "1,b"], {}, "setting sizes is '1,b'; it must be a list, each a whole number"),
        (["--mode", "c"], {}, "setting mode is 'c'; it must be one of a, b"),
        (["--port", "70000"], {}, "setting port is 70000; it must be at most 65535"),
        ([], {"HEADWAY_TEST_PROT": "1"}, "environment variable HEADWAY_TEST_PROT names no setting of headway-test"),
        (["--config", "/nowhere/c.toml"], {}, "config file /nowhere/c.toml cannot be read: No such file"),
    ],
)
def test_one_clear_line(argv: list[str], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*argv, **environ)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot = 1", "unknown key 'prot'; known keys are loud, mode, name, peers, port, rate, sizes"),
        ("port = 1.5", "setting port is 1.5; it must be a whole number"),
        ("port = true", "setting port is True; it must be a whole number"),
        ("name = 3", "setting name is 3; it must be text"),
        ("peers = [1]", "setting peers is [1]; it must be a list, each text"),
        ("peers = 'a'\nport = {}", "setting port is {}; it must be a whole number"),
        ("port = ", "is not valid TOML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("--config", toml(tmp_path, text))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["headway-test", "--port", "x"])
    with pytest.raises(SystemExit) as caught:
        load_or_exit(Settings, "headway-test")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "headway-test: setting port is 'x'; it must be a whole number\n"


@pytest.mark.parametrize("service", ["prefill", "decode", "kvstore", "router"])
def test_services_stop_with_one_line(service: str) -> None:
    command = [sys.executable, "-m", f"services.{service}.server", "--port", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stderr == f"headway-{service}: setting port is 'x'; it must be a whole number\n"
