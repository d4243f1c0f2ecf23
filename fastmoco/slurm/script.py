"""The scripts of slurm/ as texts whose #SBATCH lines and variables can be set."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# A link to slurm/ in a checkout, a folder of files where the package is installed.
_FOLDER = Path(__file__).with_name("templates")
_COMMON = "job.sh"


class Script:
    """The script for sbatch called `kind`, whole: what it sources stands in it."""

    def __init__(self, kind: str) -> None:
        text = (_FOLDER / f"{kind}.sbatch").read_text(encoding="utf-8")
        common = (_FOLDER / _COMMON).read_text(encoding="utf-8")
        self.text = self._replaced(rf'^source ".*/{re.escape(_COMMON)}"$', common.rstrip("\n"), text)

    def directive(self, name: str, value: str | None) -> None:
        """Have #SBATCH --name=value, or only --name for "", or none of that name for None."""
        pattern, line = rf"^#SBATCH --{re.escape(name)}(=.*)?$", f"#SBATCH --{name}{f'={value}' if value else ''}"
        if value is None:
            self.text = re.sub(pattern + "\n", "", self.text, flags=re.MULTILINE)
        elif re.search(pattern, self.text, re.MULTILINE):
            self.text = self._replaced(pattern, line, self.text)
        else:
            self.text = self._replaced(r"^set -euo pipefail$", f"{line}\nset -euo pipefail", self.text)

    def variable(self, name: str, value: str | int | Sequence[str]) -> None:
        """Have the assignment of the shell variable `name` assign `value`, an array where it is a sequence."""
        quoted = shlex.quote(str(value)) if isinstance(value, str | int) else f"({shlex.join(value)})"
        self.text = self._replaced(rf"^{re.escape(name)}=.*$", f"{name}={quoted}", self.text)

    @staticmethod
    def _replaced(pattern: str, by: str, text: str) -> str:
        changed, count = re.subn(pattern, lambda match: by, text, flags=re.MULTILINE)
        if count != 1:
            raise RuntimeError(f"{count} lines match {pattern}, not one")
        return changed
