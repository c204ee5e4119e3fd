"""Which variables are secrets by their names, as docs/security.md lists them."""

import pytest

from launchers.redaction import redactor

SECRET = [
    "HF_TOKEN",
    "WANDB_API_KEY",
    "MY_SECRET",
    "PGPASSWORD",
    "PGPASSFILE",
    "SSH_PASSPHRASE",
    "PASSPHRASE",
    "GOOGLE_CREDENTIALS",
    "AWS_PROFILE",
    "DB_PASS",
    "SSHPASS",
    "MYSQL_PWD",
    "GITHUB_PAT",
    "PAT",
    "DATABASE_URL",
    "DATABASE_URL_TEST",
    "SENTRY_DSN",
    "REGISTRY_AUTH",
    "DOCKER_AUTH_CONFIG",
    "npm_config__auth",
    "db_pass",
]
PLAIN = [
    "PATH",
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "INFOPATH",
    "PWD",
    "OLDPWD",
    "SSH_AUTH_SOCK",
    "XAUTHORITY",
    "COMPASS",
    "NCCL_BYPASS",
    "TORCH_PASSES",
    "PATTERN",
    "MAWS_HOME",
    "AUTHOR",
    "NUM_PATCHES",
]


@pytest.mark.parametrize("name", SECRET)
def test_the_value_of_a_secrets_name_is_replaced(name: str) -> None:
    assert redactor({name: "hunter-2"})("it is hunter-2.") == f"it is [{name} redacted]."


@pytest.mark.parametrize("name", PLAIN)
def test_other_values_stay(name: str) -> None:
    assert redactor({name: "hunter-2"})("it is hunter-2.") == "it is hunter-2."
