"""What a notebook's kernel runs on, in one view: the verdict, the machine, the user, the guard."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from html import escape

from cloister.connection import current
from cloister.rendering import html_box, html_table, text_table
from cloister.verdict import Attestation, attestation
from cloister_data.errors import CloisterError
from cloister_data.identity import WhoAmI


@dataclass(frozen=True)
class Status:
    """`me` is what the guard answered, `trouble` why it didn't; `verdict` is the laptop's, where it sent one."""

    me: WhoAmI | None
    trouble: str
    verdict: Attestation | None
    doubt: str

    @property
    def rows(self) -> list[list[str]]:
        """(what, its value), for people."""
        result = self.verdict.result if self.verdict is not None else None
        if result is None:
            verdict = f"unknown: {self.doubt}"
        else:
            verdict = f"{'proven' if result.ok else 'NOT PROVEN'}{' (SIMULATED hardware)' if result.simulated else ''}"
        rows: list[list[str]] = [["verdict", verdict]]
        rows.append(["platform", (result and result.platform) or "unknown"])
        if self.me is not None:
            rows += [
                ["cloister", f"{self.me.cloister}, version {self.me.version}"],
                ["user", f"{self.me.user} ({self.me.role})"],
                ["sandbox", self.me.sandbox or "not a kernel"],
            ]
        uname = platform.uname()
        rows.append(["machine", f"{uname.system} {uname.release}, {uname.machine}, {os.cpu_count() or '?'} CPUs"])
        rows.append(["guard", "reachable" if self.me is not None else f"NOT REACHABLE: {self.trouble}"])
        return rows

    def __repr__(self) -> str:
        note = f"\n\n{self.verdict.note}" if self.verdict is not None else ""
        return text_table(["status", ""], self.rows) + note

    def _repr_html_(self) -> str:
        note = f"<p><small>{escape(self.verdict.note)}</small></p>" if self.verdict is not None else ""
        return html_box("Cloister", html_table(["status", ""], self.rows) + note)


def status() -> Status:
    """Ask the guard and look at the verdict. Costs nothing; never raises for what it is to tell."""
    me, trouble, verdict, doubt = None, "", None, ""
    try:
        me = current().call("GET", "/me", receive=WhoAmI)
    except CloisterError as error:
        trouble = str(error)
    try:
        verdict = attestation()
    except CloisterError as error:
        doubt = str(error)
    return Status(me, trouble, verdict, doubt)
