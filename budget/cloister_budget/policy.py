"""The owner's policy, decided. Pure: no clock, no database. Everything is refused unless every rule admits it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cloister_data.policy import SANDBOX_ORDER, Operation, Platform, Policy, Sandbox


@dataclass(frozen=True)
class AccessRequest:
    """Who asks for what. `sandbox` is that of the kernel that asks; None says it doesn't come from a kernel."""

    user: str
    operation: Operation
    epsilon: float
    platform: Platform
    sandbox: Sandbox | None
    dataset: str


@dataclass(frozen=True)
class Decision:
    """`rule` names the rule that refused, or "admitted"; `reason` is a sentence for people, from public facts only."""

    allowed: bool
    rule: str
    reason: str


def _dataset(request: AccessRequest, policy: Policy, now: int) -> str:
    return "" if request.dataset == policy.dataset else f"The policy is about {policy.dataset}, not {request.dataset}."


def _expired(request: AccessRequest, policy: Policy, now: int) -> str:
    return "" if policy.expires is None or now < policy.expires else "The policy has expired."


def halted(policy: Policy, user: str) -> str:
    """Why everything that `user` runs on the dataset is to stop at once, or nothing."""
    if policy.suspended:
        return f"The owner has suspended {policy.dataset}."
    return f"The owner has suspended the user {user}." if user in policy.suspended_users else ""


def _suspended(request: AccessRequest, policy: Policy, now: int) -> str:
    return halted(policy, request.user)


def _user(request: AccessRequest, policy: Policy, now: int) -> str:
    return "" if request.user in policy.readers else f"The policy doesn't list the user {request.user}."


def _operation(request: AccessRequest, policy: Policy, now: int) -> str:
    if request.operation in policy.operations:
        return ""
    return f"The policy doesn't allow {request.operation}; it allows {', '.join(policy.operations) or 'nothing'}."


def _epsilon(request: AccessRequest, policy: Policy, now: int) -> str:
    return "" if math.isfinite(request.epsilon) and request.epsilon > 0 else "Epsilon must be a positive number."


def _epsilon_cap(request: AccessRequest, policy: Policy, now: int) -> str:
    if request.epsilon <= policy.epsilon_cap:
        return ""
    return f"Epsilon {request.epsilon:g} is over the policy's cap of {policy.epsilon_cap:g} for one request."


def _account(request: AccessRequest, policy: Policy, now: int) -> str:
    limits = (policy.population_limit, *policy.limits_of(request.user))
    refusals = {refusal for limit in limits if (refusal := limit.refuses(request.epsilon, now))}
    if "expired" in refusals:
        return f"An account that {request.user} is charged to has expired."
    return f"Epsilon {request.epsilon:g} is over the cap of an account for one request." if refusals else ""


def _platform(request: AccessRequest, policy: Policy, now: int) -> str:
    if request.platform in policy.platforms:
        return ""
    return f"The policy doesn't accept the platform {request.platform}."


def _sandbox(request: AccessRequest, policy: Policy, now: int) -> str:
    if request.sandbox is None:
        return ""
    if SANDBOX_ORDER.index(request.sandbox) >= SANDBOX_ORDER.index(policy.minimum_sandbox):
        return ""
    return f'The kernel\'s sandbox is "{request.sandbox}"; the policy asks for "{policy.minimum_sandbox}" at least.'


RULES: tuple[tuple[str, Callable[[AccessRequest, Policy, int], str]], ...] = (
    ("dataset", _dataset),
    ("suspended", _suspended),
    ("expired", _expired),
    ("user", _user),
    ("operation", _operation),
    ("epsilon", _epsilon),
    ("epsilon_cap", _epsilon_cap),
    ("account", _account),
    ("platform", _platform),
    ("sandbox", _sandbox),
)
"""In the order in which they are asked. A rule answers why it refuses, or nothing."""


def decide(request: AccessRequest, policy: Policy, now: int) -> Decision:
    """The first rule that refuses decides; `now` is in Unix seconds. The caller has verified the policy's signature."""
    for name, rule in RULES:
        reason = rule(request, policy, now)
        if reason:
            return Decision(False, name, reason)
    return Decision(True, "admitted", "Every rule of the policy admits the request.")


def decide_transfer(user: str, policies: Iterable[Policy]) -> Decision:
    """Whether `user` may move a file between a laptop and a kernel, by every policy in force in the cloister.

    One that names the user and forbids it decides, also where it has expired or is suspended: what the kernel may hold
    was given out before. The first by the dataset's name is told.
    """
    for policy in sorted(policies, key=lambda policy: policy.dataset):
        if user in policy.readers and policy.transfers != "allowed":
            return Decision(
                False, "transfers", f"The policy of {policy.dataset} forbids to move files to and from a kernel."
            )
    return Decision(True, "admitted", "No policy that names the user forbids transfers.")
