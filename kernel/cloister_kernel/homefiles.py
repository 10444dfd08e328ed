"""Write or read one file in a kernel's home, as the kernel's own uid: `python -I -S homefiles.py put|get`.

Standard input begins with a line of JSON, `{"home", "uid", "path", "size"}`; `uid` null keeps the present one, `size`
is that of the file to put, or of the largest to get. Output begins with a line of JSON, `{"size"}` or `{"error"}`.

- put: after that line the input goes on with `size` bytes and the byte `!`. Only then the file gets its name, in one
  step, and a second line says so. Where the input ends before, nothing of it remains.
- get: after that line come exactly `size` bytes.

Whatever lies in the home was put there by something hostile, which may also change it at any moment. So every name is
opened below the directory before it, and no link is followed anywhere; and what could be reached nevertheless, the
kernel's uid could reach anyway.
"""

import contextlib
import errno
import io
import json
import os
import secrets
import stat
import sys

FIRST, LAST = 200_000, 265_535  # cloister_kernel.uids; this file runs without the package
CHUNK = 1 << 20
MAX_HEAD = 1 << 16
COMMIT = b"!"


class Refused(Exception):
    """Its text is the answer's `error`, which `cloister_kernel.transfers` has the words for."""


def main(arguments: "list[str]") -> int:
    source = io.BufferedReader(io.FileIO(0), CHUNK)
    head = json.loads(source.readline(MAX_HEAD))
    home = os.open(head["home"], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    become(head["uid"])
    names = head["path"].split("/")
    try:
        if any(name in ("", ".", "..") or "\0" in name for name in names):
            raise Refused("bad-path")
        if arguments[0] == "put":
            made: list[tuple[int, str]] = []
            try:
                done = put(parent(home, names[:-1], made), names[-1], head["size"], source)
            except BaseException:
                unmake(made)
                raise
            if not done:
                unmake(made)
        else:
            get(parent(home, names[:-1]), names[-1], head["size"])
    except Refused as refused:
        say({"error": str(refused)})
    except OSError as error:
        say({"error": word(error)})
    return 0


def become(uid: "int | None") -> None:
    """For good. The kernel's own processes can't trace what has changed its uid to theirs: it isn't dumpable."""
    os.umask(0o077)
    if uid is None:
        return
    if not FIRST <= uid <= LAST:
        raise ValueError("no kernel has this uid")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if os.getresuid() != (uid, uid, uid) or os.getresgid() != (uid, uid, uid):
        raise ValueError("the kernel's uid didn't take hold")


def parent(home: int, names: "list[str]", made: "list[tuple[int, str]] | None" = None) -> int:
    """The directory that `names` lead to from `home`, one by one. With `made`, those that are missing are made."""
    for name in names:
        if made is not None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=home)
                made.append((home, name))
        try:
            home = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=home)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise Refused("no-directory") from error
            raise
    return home


def unmake(made: "list[tuple[int, str]]") -> None:
    for home, name in reversed(made):
        with contextlib.suppress(OSError):  # it is used by now
            os.rmdir(name, dir_fd=home)


def put(directory: int, name: str, size: int, source: "io.BufferedReader[io.FileIO]") -> bool:
    """False where the input ended early, and nothing was put."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISREG(found.st_mode):
            raise Refused("not-a-file")
    unfinished = f".cloister-put-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(unfinished, flags, 0o600, dir_fd=directory)
    try:
        if size:
            os.posix_fallocate(file, 0, size)  # a full disk shows before anything is sent
        say({"size": size})
        left = size
        while left:
            chunk = source.read1(min(left, CHUNK))
            if not chunk:
                return False  # nobody is there any more
            write(file, chunk)
            left -= len(chunk)
        if source.read(1) != COMMIT:
            return False
        os.rename(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
        unfinished = ""
        say({"size": size})
        return True
    finally:
        os.close(file)
        if unfinished:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished, dir_fd=directory)


def get(directory: int, name: str, most: int) -> None:
    # Opening a FIFO or a device must neither wait nor do anything.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        file = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Refused("not-a-file") from error
        raise
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise Refused("not-a-file")
    if found.st_size > most:
        raise Refused("too-large")
    say({"size": found.st_size})
    left = found.st_size
    while left:
        chunk = os.read(file, min(left, CHUNK))
        if not chunk:
            return  # it was cut short meanwhile
        write(1, chunk)
        left -= len(chunk)


def write(file: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(file, view) :]


def say(told: "dict[str, object]") -> None:
    write(1, json.dumps(told).encode() + b"\n")


def word(error: OSError) -> str:
    words = {
        errno.ENOENT: "not-found",
        errno.EACCES: "no-access",
        errno.EPERM: "no-access",
        errno.EISDIR: "not-a-file",
        errno.ENOSPC: "disk-full",
        errno.EDQUOT: "disk-full",
        errno.EFBIG: "disk-full",
        errno.ENAMETOOLONG: "bad-path",
    }
    return words.get(error.errno or 0, "failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
