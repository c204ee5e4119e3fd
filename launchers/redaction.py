"""Keeping secrets of the environment out of what a run says and writes down.

What counts is the name of a variable; docs/security.md lists which. Its value is replaced wherever the run's own text
would show it; short values and the paths of files that are there stay, since they are no secrets and would garble
everything else. What a user writes into a config is kept as it was written.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote

SECRET = re.compile(
    r"TOKEN|KEY|SECRET|PASSW|PASSPHRASE|PASSFILE|CREDENTIAL|DATABASE_URL|^AWS_"
    # The short words only at the end, which keeps PATH, PWD, OLDPWD and SSH_AUTH_SOCK.
    r"|(?<!BY)(?<!COM)PASS$|_PWD$|(?:^|_)(?:PAT|DSN)$|_AUTH(?:_CONFIG)?$",
    re.I,
)
"""Names of variables whose values are secrets."""
LEAST_LENGTH = 6
"""Characters from which on a value can be a secret."""


def redactor(environment: Mapping[str, str]) -> Callable[[str], str]:
    """Make the function that replaces the secrets of an environment in a text by `[NAME redacted]`."""
    names: dict[str, str] = {}
    for name, value in environment.items():
        if SECRET.search(name) and not _is_path(value):
            for part in (value, *value.splitlines()):
                # As it is, and as JSON, Python and addresses write it.
                forms = (part, json.dumps(part)[1:-1], repr(part)[1:-1], quote(part, safe=""))
                names |= {form: name for form in forms if len(part.strip()) >= LEAST_LENGTH}
    if not names:
        return str
    longest_first = sorted(names, key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, longest_first)))
    return lambda text: found.sub(lambda match: f"[{names[match[0]]} redacted]", text)


def _is_path(value: str) -> bool:
    try:
        return value.startswith("/") and Path(value).exists()
    except (OSError, ValueError):  # too long for a name
        return False
