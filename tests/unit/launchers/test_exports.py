"""Which variables a job gets."""

import os
import stat
from pathlib import Path

import pytest

from launchers.exports import exported_names, job_environment


def test_what_programs_need_is_exported_and_what_looks_like_a_secret_is_not() -> None:
    names = ("PATH", "LC_ALL", "PYTHONPATH", "CUDA_HOME", "NCCL_DEBUG", "BASH_FUNC_module%%", "TORCH_LOGS", "HF_HOME")
    secret = ("HF_TOKEN", "NCCL_AUTH_KEY", "PYTHON_PASSWORD", "AWS_PROFILE", "WANDB_API_KEY", "MY_SECRET", "EDITOR")
    assert exported_names(dict.fromkeys((*names, *secret), "x")) == sorted(names)
    assert exported_names(dict.fromkeys(secret, "x"), ["HF_TOKEN", "NOT_THERE"]) == ["HF_TOKEN"]


def test_the_environment_is_a_jobs_for_the_block_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"SLURM_CONF": "/here", "SLURM_JOB_ID": "5", "NCCL_DEBUG": "INFO", "MINE": "1", "OTHER": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before, umask = dict(os.environ), os.umask(0o022)
    try:
        with job_environment(["MINE"]):
            assert {name: value for name, value in os.environ.items() if name in given} == {
                "SLURM_CONF": "/here",
                "NCCL_DEBUG": "INFO",
                "MINE": "1",
            }
            (tmp_path / "private").touch()
        assert dict(os.environ) == before
        (tmp_path / "public").touch()
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "public").stat().st_mode) == 0o644
