"""Which variables of the submitting shell a SLURM job gets: those on a list, never all.

A shell holds tokens and keys, and SLURM would keep what it is given on its controller's disk and hand it to every
process of the job. The list is held by giving sbatch no other variables: `sbatch --export=NAMES` would not do, since it
has the node add the user's login environment (`su - USER`), with the secrets of the profile in it.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import submitit

from launchers.redaction import SECRET

# What programs need to be found and to find their files, and what torch and the network libraries are tuned by.
EXPORTED = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR", "XDG_CACHE_HOME"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_*", "PYTHON*"),
    *("MODULE*", "LMOD_*", "__LMOD_*", "LOADEDMODULES", "_LMFILES_", "BASH_ENV", "BASH_FUNC_module*", "BASH_FUNC_ml*"),
    *("CUDA_*", "NVIDIA_*", "CUBLAS_*", "NCCL_*", "TORCH*", "PYTORCH_*", "TRITON_*", "GLOO_*", "OMP_*", "MKL_*"),
    *("KMP_*", "UCX_*", "FI_*", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
)


def exported_names(environment: Mapping[str, str], added: Sequence[str] = ()) -> list[str]:
    """List the variables that a job gets; `added` are names that the user asks for, whatever they look like."""
    return sorted(
        name
        for name in environment
        if name in added or (not SECRET.search(name) and any(fnmatchcase(name, pattern) for pattern in EXPORTED))
    )


@contextlib.contextmanager
def job_environment(added: Sequence[str] = ()) -> Iterator[None]:
    """Leave only what a job may have in this process's environment, and make its files for this user alone.

    The variables of a job that this command runs in are hidden too; they would steer the new one. sbatch hands the
    umask on to the job.
    """
    before = dict(os.environ)
    kept = {name: before[name] for name in exported_names(before, added)}
    if "SLURM_CONF" in before:  # says where the cluster is
        kept["SLURM_CONF"] = before["SLURM_CONF"]
    umask = os.umask(0o077)
    try:
        with submitit.helpers.clean_env():
            os.environ.clear()
            os.environ.update(kept)
            yield
    finally:
        os.umask(umask)
        os.environ.clear()
        os.environ.update(before)
