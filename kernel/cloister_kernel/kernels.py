"""The kernels of one cloister by their ids: started, watched, ended, and made known to each guard that comes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from cloister_data.errors import CloisterError, ConflictError, ForbiddenError, NotFoundError
from cloister_data.kernels import (
    EndingKind,
    KernelFigures,
    KernelList,
    KernelMeet,
    KernelQuery,
    KernelSignal,
    KernelStart,
    KernelState,
    KernelView,
    KernelWipe,
)
from cloister_kernel.control import ControlClient
from cloister_kernel.endings import Periods, ending
from cloister_kernel.holdings import RESERVED_BYTES, Holdings
from cloister_kernel.idling import IdleRule
from cloister_kernel.journal import log
from cloister_kernel.limits import ABANDONED_SECONDS, Limits
from cloister_kernel.pool import Pool
from cloister_kernel.relay import KernelRelay
from cloister_kernel.spawner import HomeOperation, HomeProcess, Spawner, Started
from cloister_kernel.usage import Memory, ProcessMemory

REMEMBER_SECONDS = 24 * 3600.0
REMEMBER_MUCH_SECONDS = 600.0
"""How long an ended kernel's last output and exit code wait for its laptop."""
REMEMBER_KERNELS = 4
LEASE_SECONDS = 72 * 3600.0
"""How long a kernel lives that no laptop is attached to."""
IDLE_SECONDS = 24 * 3600.0
GUARD_AWAY_SECONDS = 900.0
"""How long kernels live while no guard is there."""
SAVE_SECONDS = 120.0
"""How often the homes are looked at for what has changed."""
LOOK_SECONDS = 5.0
"""The longest time between two looks at idle, left and forgotten kernels."""
FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Rules:
    """What a kernel service allows its kernels. Times in seconds."""

    limits: Limits = field(default_factory=Limits)
    idle: IdleRule = field(default_factory=lambda: IdleRule(IDLE_SECONDS))
    lease: float = LEASE_SECONDS
    guard_away: float = GUARD_AWAY_SECONDS
    warm: int = 0
    """How many kernels wait for a user."""

    @property
    def periods(self) -> Periods:
        return Periods(idle=self.idle.after, lease=self.lease, room=ABANDONED_SECONDS)

    @property
    def look(self) -> float:
        return min(LOOK_SECONDS, self.idle.notice / 4, self.lease / 4, self.guard_away / 4)


@dataclass
class Kernel:
    """`guard` is the run of the guard that knows it; `cause` why the service ends it. Moments are monotonic seconds."""

    user: str
    started: Started
    relay: KernelRelay
    since: int
    guard: str | None
    buried: asyncio.Event
    watcher: asyncio.Task[None] | None = None
    cause: EndingKind | None = None
    exit_code: int | None = None
    ended_at: float | None = None
    seen_at: float = 0.0  # when a laptop was last attached
    warned_at: float | None = None

    @property
    def away(self) -> float:
        """For how many seconds no laptop has been attached."""
        return 0.0 if self.relay.attached else time.monotonic() - self.seen_at

    def view(self) -> KernelView:
        state: KernelState = "running" if self.exit_code is None else "dead"
        return KernelView(
            kernel=self.started.kernel,
            state=state,
            started=self.since,
            sandbox=self.started.sandbox,
            exit_code=self.exit_code,
            idle=int(self.away) if state == "running" else 0,
        )


class KernelService:
    """Attributes:
    abandoned: set when no guard has been there for too long: the service has to end, with its kernels.
    """

    def __init__(
        self, spawner: Spawner, control: ControlClient, rules: Rules | None = None, memory: Memory | None = None
    ) -> None:
        self.name = secrets.token_hex(16)
        self.abandoned = asyncio.Event()
        self._spawner, self._control = spawner, control
        self._rules = rules or Rules()
        self._pool = Pool(spawner, self._rules.warm, log)
        self._saved_at = time.monotonic()
        self._saving: asyncio.Task[None] | None = None
        self._memory: Memory = memory or ProcessMemory()
        self._kernels: dict[str, Kernel] = {}
        self._starting: Counter[str] = Counter()  # by user
        self._started = 0
        self._ended: Counter[EndingKind] = Counter()
        self._guard: str | None = None
        self._guard_at = time.monotonic()
        self._holdings = Holdings()

    async def start(self, order: KernelStart) -> KernelView:
        """Raises TooManyRequestsError at a limit, or what the spawner or the guard raises."""
        # Nothing is awaited between the count and the reservation: two starts can't both get the last place.
        alive = [kernel for kernel in self._kernels.values() if kernel.exit_code is None]
        own = sum(kernel.user == order.user for kernel in alive) + self._starting[order.user]
        refusal = self._rules.limits.refusal(own, len(alive) + self._starting.total())
        leaving = self._longest_left(order.user) if refusal is not None else None
        if refusal is not None and leaving is None:
            raise refusal
        if leaving is not None:
            leaving.cause = "room"
        self._starting[order.user] += 1
        try:
            if leaving is not None:
                await self.end(leaving, "room")
            return await self._start(order)
        finally:
            self._starting -= Counter([order.user])  # which also forgets users without any

    def _longest_left(self, user: str) -> Kernel | None:
        """The kernel of this user whose laptop has been away for longest, and for long enough."""
        own = [kernel for kernel in self._kernels.values() if kernel.user == user]
        left = [k for k in own if k.exit_code is None and k.cause is None and k.away >= ABANDONED_SECONDS]
        return max(left, key=lambda kernel: kernel.away, default=None)

    async def _start(self, order: KernelStart) -> KernelView:
        prepared = await self._pool.take()
        identifier, uid = prepared.kernel, prepared.uid
        guard = self._guard
        try:
            # The guard knows whose kernel it is before the first line of its user's code can run.
            guard_socket = await self._control.register(
                identifier, uid, order.user, self._spawner.sandbox, service=self.name
            )
        except BaseException:
            await self._spawner.discard(prepared)
            raise
        try:
            started = await self._spawner.assign(prepared, order.user, guard_socket, order.launch)
        except BaseException:
            with contextlib.suppress(CloisterError):
                await self._control.end(identifier)
            raise
        relay = KernelRelay(self._holdings, started.paths, started.key)
        kernel = Kernel(order.user, started, relay, int(time.time()), guard, asyncio.Event(), seen_at=time.monotonic())
        self._kernels[identifier] = kernel
        self._started += 1
        kernel.watcher = asyncio.create_task(self._watch(kernel))
        log("kernel started", kernel=identifier, user=order.user, uid=uid, sandbox=started.sandbox)
        return kernel.view()

    async def _watch(self, kernel: Kernel) -> None:
        """Wait for the process, then bury it: what it left is killed and deleted, and the guard is told."""
        identifier = kernel.started.kernel
        code = self._spawner.exit_code(await kernel.started.process.wait())
        memory = await asyncio.to_thread(self._memory.exceeded, kernel.started)
        cause = kernel.cause or ("asked" if kernel.relay.asked_to_end else None)
        why = ending(code, cause, self._rules.periods, memory)
        try:
            await self._spawner.end(kernel.started)
        except Exception as error:
            # Its uid stays lent: what goes on under it meets no other kernel.
            log("kernel not swept", kernel=identifier, error=type(error).__name__)
        try:
            await self._control.end(identifier)
        except CloisterError as error:
            log("guard not told", kernel=identifier, error=error.code)
        # A guard that is away, or hasn't met this kernel yet, leaves it.
        remove_socket(Path(kernel.started.guard_socket))
        await kernel.relay.finish(code, why.text)
        kernel.exit_code, kernel.ended_at = code, time.monotonic()
        self._ended[why.kind] += 1
        kernel.buried.set()
        log("kernel ended", kernel=identifier, exit_code=code, reason=why.kind)
        await self._forget_old(kernel.user)

    async def _forget_old(self, user: str) -> None:
        """Of one user's ended kernels only the last few are remembered: each may still hold its last output."""
        ended = [kernel for kernel in self._kernels.values() if kernel.user == user and kernel.ended_at is not None]
        ended.sort(key=lambda kernel: kernel.ended_at or 0.0)
        for kernel in ended[:-REMEMBER_KERNELS]:
            await self._forget(kernel)

    async def _forget(self, kernel: Kernel) -> None:
        self._kernels.pop(kernel.started.kernel, None)
        await kernel.relay.close()

    def find(self, identifier: str) -> Kernel:
        kernel = self._kernels.get(identifier)
        if kernel is None:
            raise NotFoundError("There is no such kernel.", next_step="Start another one.")
        return kernel

    def find_running(self, identifier: str) -> Kernel:
        """One whose home is still there. Raises NotFoundError."""
        kernel = self.find(identifier)
        if kernel.exit_code is not None or kernel.started.process.returncode is not None:
            raise NotFoundError("The kernel has ended, and its home is gone.", next_step="Start another one.")
        return kernel

    async def home_of(self, kernel: Kernel, operation: HomeOperation) -> HomeProcess:
        """`homefiles.py` at work in the kernel's home."""
        return await self._spawner.home_process(kernel.started, operation)

    async def signal(self, order: KernelSignal) -> KernelView:
        kernel = self.find(order.kernel)
        if order.op == "interrupt":
            self._spawner.interrupt(kernel.started)
        elif order.op == "end":
            await self.end(kernel, "asked")
        return kernel.view()

    async def end(self, kernel: Kernel, cause: EndingKind) -> None:
        """Kill it at once; returns when it is buried."""
        if kernel.started.process.returncode is None:
            kernel.cause = kernel.cause or cause
            with contextlib.suppress(ProcessLookupError):
                kernel.started.process.kill()
        await kernel.buried.wait()

    def list(self, order: KernelQuery) -> KernelList:
        return KernelList(kernels=tuple(k.view() for k in self._kernels.values() if k.user == order.user))

    async def wipe(self, order: KernelWipe) -> KernelList:
        """Delete a user's home. Raises InvalidRequestError while a kernel of that user runs."""
        await self._spawner.wipe(order.user)
        return self.list(KernelQuery(user=order.user))

    async def meet(self, order: KernelMeet) -> KernelFigures:
        """A guard says that it is there. It gets the kernels that it doesn't know, and the figures of all."""
        self._guard_at = time.monotonic()
        unknown = [k for k in self._kernels.values() if k.exit_code is None and k.guard != order.guard]
        await asyncio.gather(*(self._register_again(kernel, order.guard) for kernel in unknown))
        self._guard = order.guard
        alive = [kernel for kernel in self._kernels.values() if kernel.exit_code is None]
        return KernelFigures(
            service=self.name,
            running=len(alive),
            starting=self._starting.total(),
            warm=self._pool.warm,
            memory_bytes=await asyncio.to_thread(self._memory.used, [kernel.started for kernel in alive]),
            started=self._started,
            ended=dict(self._ended),
        )

    async def _register_again(self, kernel: Kernel, guard: str) -> None:
        """A kernel that the guard doesn't take is ended; where the guard can't answer, the next meeting asks again."""
        started = kernel.started
        try:
            path = await self._control.register(
                started.kernel, started.uid, kernel.user, started.sandbox, service=self.name, again=True
            )
            if path != started.guard_socket:
                raise ConflictError("The guard put the kernel's socket elsewhere.")
        except (ForbiddenError, ConflictError) as error:
            log("kernel not taken over", kernel=started.kernel, error=error.code)
            await self.end(kernel, "guard")
        except CloisterError as error:
            log("kernel not registered again", kernel=started.kernel, error=error.code)
        else:
            kernel.guard = guard
            log("kernel registered again", kernel=started.kernel)

    async def housekeeping(self) -> None:
        """Forget the ended, warn and end the idle, end those that were left; keep kernels warm, and homes saved."""
        self._pool.open()
        while not self.abandoned.is_set():
            await asyncio.sleep(self._rules.look)
            now = time.monotonic()
            if now - self._guard_at > self._rules.guard_away:
                log("no guard", seconds=int(now - self._guard_at))
                self.abandoned.set()
            for kernel in list(self._kernels.values()):
                if kernel.ended_at is None:
                    await self._look_after(kernel, now)
                elif now - kernel.ended_at > _remembered(kernel):
                    await self._forget(kernel)
            if now - self._saved_at > SAVE_SECONDS and (self._saving is None or self._saving.done()):
                # Beside this loop: what a large or hostile home takes must keep no other kernel from its end.
                self._saving = asyncio.create_task(self._save())
                self._saved_at = now

    async def _save(self) -> None:
        try:
            await self._spawner.save()
        except Exception as error:
            log("homes not saved", error=type(error).__name__)

    async def _look_after(self, kernel: Kernel, now: float) -> None:
        if kernel.relay.attached:
            kernel.seen_at = now
        if now - kernel.seen_at > self._rules.lease:
            await self.end(kernel, "lease")
            return
        warned = None if kernel.warned_at is None else now - kernel.warned_at
        step = self._rules.idle.step(kernel.relay.activity.idle, warned)
        if step == "warn":
            kernel.warned_at = now
            kernel.relay.say(self._rules.idle.warning())
            log("idle kernel warned", kernel=kernel.started.kernel)
        elif step == "end":
            await self.end(kernel, "idle")

    async def close(self) -> None:
        """End every kernel, and let the laptops that are there know."""
        await self._pool.close()
        kernels = list(self._kernels.values())
        await asyncio.gather(*(self.end(kernel, "service") for kernel in kernels), return_exceptions=True)
        await asyncio.gather(*(kernel.relay.flush(FLUSH_SECONDS) for kernel in kernels), return_exceptions=True)
        await asyncio.gather(*(kernel.relay.close() for kernel in kernels), return_exceptions=True)
        if self._saving is not None:
            await self._saving
        await self._spawner.close()


def _remembered(kernel: Kernel) -> float:
    """For how many seconds an ended kernel is: not long, where it holds much of the memory that all share."""
    return REMEMBER_SECONDS if kernel.relay.link.holding.held <= RESERVED_BYTES else REMEMBER_MUCH_SECONDS


def remove_socket(path: Path) -> None:
    """A dead kernel's guard socket, and the directory of its own."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()
