"""Become a program under the ruleset and the filter: `python confined.py HOME READABLE:... PROGRAM ARGUMENT...`."""

import os
import sys

from cloister_kernel.process import no_new_privileges
from cloister_kernel.sandbox import filter as kernel_filter
from cloister_kernel.sandbox import landlock
from cloister_kernel.sandbox.view import package_sources


def interpreter() -> list[str]:
    """What any program of these tests reads."""
    roots = ["/usr", "/lib", "/lib64", "/bin", "/etc", "/proc", "/sys", sys.prefix, sys.base_prefix]
    # Python lists the directory that a package lies in before it opens the package.
    sources = sorted({os.path.dirname(source) for source in package_sources()})
    return [path for path in [*roots, *sources] if os.path.exists(path)]


def command(home: object, readable: list[str], *program: str) -> list[str]:
    paths = os.pathsep.join([*interpreter(), *readable])
    return [sys.executable, __file__, str(home), paths, *program]


def main() -> None:
    home, readable, *program = sys.argv[1:]
    os.environ |= {"HOME": home, "TMPDIR": home, "MPLBACKEND": "Agg"}
    os.chdir(home)
    if not no_new_privileges():
        raise SystemExit("no_new_privs didn't take hold")
    landlock.restrict(readable.split(os.pathsep), [home])
    kernel_filter.install()
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
