"""Settings come from ELBOW_ variables, bounds included, and a misspelt one is named."""

from __future__ import annotations

import os

import pytest

from service.settings import Settings, flag_names, read_settings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("ELBOW_")]:
        monkeypatch.delenv(name)


def test_variables_reach_their_fields(monkeypatch):
    monkeypatch.setenv("ELBOW_PORT", "9000")
    monkeypatch.setenv("ELBOW_ENGINE", "torchscript")
    monkeypatch.setenv("ELBOW_CLOSED_FORM", "true")
    monkeypatch.setenv("ELBOW_PRECISION", "int8")
    settings = read_settings()
    assert (settings.port, settings.engine, settings.closed_form, settings.precision) == (9000, "torchscript", True, "int8")


def test_a_misspelt_variable_is_named(monkeypatch):
    monkeypatch.setenv("ELBOW_PROT", "9000")
    with pytest.raises(ValueError, match=r"unknown variable ELBOW_PROT: known are .*ELBOW_PORT"):
        read_settings()


def test_a_variable_of_training_does_no_harm(monkeypatch):
    monkeypatch.setenv("ELBOW_DATA", "/data")
    read_settings()


@pytest.mark.parametrize(
    ("name", "value"), [("ELBOW_PORT", "70000"), ("ELBOW_ENGINE", "tensorrt"), ("ELBOW_PRECISION", "int4"), ("ELBOW_MAX_ROWS", "0")]
)
def test_a_value_out_of_bounds_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        read_settings()


def test_secrets_are_masked():
    assert "hunter2" not in repr(Settings(signing_key="hunter2"))


def test_one_core_is_left_to_the_event_loop():
    assert Settings(threads=3).engine_threads == 3
    assert Settings().engine_threads >= 1


def test_a_flag_comes_before_its_variable_and_is_checked_like_it(monkeypatch):
    monkeypatch.setenv("ELBOW_PORT", "9000")
    monkeypatch.setenv("ELBOW_MAX_ROWS", "7")
    settings = read_settings(flags={"port": "9001", "closed_form": "true"})
    assert (settings.port, settings.max_rows, settings.closed_form) == (9001, 7, True)
    with pytest.raises(ValueError, match="port"):
        read_settings(flags={"port": "70000"})


def test_every_setting_is_a_flag_but_for_the_secrets():
    assert set(Settings.model_fields) - set(flag_names()) == {"signing_key", "keys", "admin_key_sha256", "token_secret"}
