"""Paths of two tiny random Llamas, a student or policy and a wider teacher."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    import trl_cases

    return trl_cases.tiny(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> str:
    import trl_cases

    return trl_cases.tiny(tmp_path_factory.mktemp("teacher"), trl_cases.WIDER, seed=1)
