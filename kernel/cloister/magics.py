"""`%cloister` in a cloister's notebooks, and the name `cloister` without an import.

The kernel's application calls `load` before the first cell. Nothing heavy is imported before a magic is used.
"""

from __future__ import annotations

import json
import os
import site
import sys
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class, no_var_expand

import cloister

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from cloister.accounts import Budget
    from cloister.status import Status

COMMANDS = ("status", "budget", "put", "get", "pip", "help")
HELP = """\
%cloister status                          is the machine proven, and what is this kernel
%cloister budget                          what your accounts have left
%cloister put LOCAL [REMOTE]              a file from your laptop into this kernel's home
%cloister get REMOTE [LOCAL] [--force]    a file from this kernel's home to your laptop
%cloister pip install NAME...             packages, or wheels on your laptop, for this kernel
%cloister help                            this text

put, get and pip are carried out by your laptop, so each has to be the only line of its cell. LOCAL lies below the
notebook's directory and isn't hidden, REMOTE lies in the kernel's home; a path that ends with / keeps the file's name.
A file may have {limit}. Nothing on your laptop is overwritten without --force. Each moved file is in the audit log.
The owner of a dataset may forbid it to all who may use the dataset."""

_ALONE = "put, get and pip have to be the only line of their cell, as your laptop carries them out"


@magics_class
class CloisterMagics(Magics):
    """The line magic `%cloister`."""

    @no_var_expand
    @line_magic
    def cloister(self, line: str) -> Status | Budget | None:
        """Work with the cloister that this kernel runs in: `%cloister help`."""
        command, _, rest = line.strip().partition(" ")
        if command in ("put", "get", "pip"):
            self._errand(command, rest)
            return None
        if command in ("status", "budget") and rest.strip():
            raise UsageError(f"%cloister {command} takes nothing more. See %cloister help")
        if command == "status":
            from cloister.status import status

            return status()
        if command == "budget":
            return cloister.budget()
        if command in ("help", ""):
            from cloister.errands import LIMIT

            sys.stdout.write(HELP.format(limit=LIMIT) + "\n")
            return None
        raise UsageError(f"%cloister knows {', '.join(COMMANDS)}; not {command[:80]!r}. Nothing was done.")

    def _errand(self, command: str, rest: str) -> None:
        """Show what the laptop has done. This kernel can't make it do anything."""
        from pydantic import ValidationError

        from cloister.errands import METADATA, Outcome, parse
        from cloister_data.errors import CloisterError, from_problem

        told = self._metadata().pop(METADATA, None)
        try:
            outcome = Outcome.from_json(json.dumps(told))
        except ValidationError:
            parse(command, rest)  # what is wrong with the line itself comes first
            raise CloisterError(
                "Nothing was moved.",
                why=f"{_ALONE}.",
                next_step="Put the line into a cell of its own. If it is: update Cloister on your laptop.",
            ) from None
        try:
            if outcome.interrupted:
                raise KeyboardInterrupt
            if outcome.problem is not None:
                raise from_problem(outcome.problem)
            sys.stdout.write(f"\r{outcome.told}\n")
            if outcome.kind == "pip":
                from cloister.installing import install

                install(outcome.names, outcome.wheels)
        finally:
            if outcome.wheels:
                from cloister.installing import clear

                clear(outcome.wheels)

    def _metadata(self) -> dict[str, Any]:
        """That of the cell which is running; what the laptop said beside it is used once."""
        kernel = getattr(self.shell, "kernel", None)
        parent = kernel.get_parent("shell") if kernel is not None else None
        found = parent.get("metadata") if isinstance(parent, dict) else None
        return found if isinstance(found, dict) else {}


def load(shell: InteractiveShell) -> None:
    """Give a kernel's shell `%cloister`, its completion, the name `cloister`, and the user's own packages."""
    shell.register_magics(CloisterMagics)
    shell.set_hook("complete_command", _complete, str_key="%cloister")  # type: ignore[no-untyped-call]
    shell.push({"cloister": cloister}, interactive=False)  # type: ignore[no-untyped-call]
    _see_user_packages()


def _complete(_: object, event: Any) -> list[str]:
    """What may follow on the line: a command, or after pip its one."""
    words = str(event.line)[: len(str(event.text_until_cursor))].split()
    if not str(event.text_until_cursor).endswith((" ", "\t")):
        words = words[:-1]
    if len(words) == 1:
        return list(COMMANDS)
    return ["install"] if words[1:] == ["pip"] else []


def _see_user_packages() -> None:
    """What pip installs here for the user is found, also where Python was made not to look (a virtual environment)."""
    directory = site.getusersitepackages()
    if directory not in sys.path:
        places = [at for at, path in enumerate(sys.path) if os.path.basename(path) == "site-packages"]
        sys.path.insert(places[0] if places else len(sys.path), directory)
