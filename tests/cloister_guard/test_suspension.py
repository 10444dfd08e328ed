"""An owner suspends a user or a dataset, signed: nothing new is admitted, and what runs stops at once."""

import secrets
import threading
import time

import pytest

from cloister.transport import Transport
from cloister_data.datasets import DatasetView, PolicyView
from cloister_data.errors import CloisterError, ForbiddenError, PolicyRefusedError
from cloister_data.owner import sign_policy
from cloister_data.policy import Group, Limit, Policy
from cloister_data.release import Release
from cloister_data.statistics import QueryRequest, Question
from cloister_data.training import JobView, TrainingPlan
from tests.cloister_guard.test_jobs import make_plan, network, send_model, submit, used, wait
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy


class Ward:
    """One dataset of its own with two users; `put` signs and puts its next policy as the owner does."""

    def __init__(self, cloister_: RunningCloister, **changes: object) -> None:
        self.cloister, self.name, self.version = cloister_, f"sus-owner/{secrets.token_hex(4)}", 1
        for user in ("sus-ann", "sus-bob"):
            cloister_.add_user(user, "scientist")
        cloister_.upload(self.name, people(600), PEOPLE, self.policy(**changes))

    def policy(self, **changes: object) -> Policy:
        plain = make_policy(self.name, {"sus-ann": 40.0, "sus-bob": 40.0}, version=self.version)
        return Policy.model_validate(plain.model_dump() | changes)

    def put(self, **changes: object) -> PolicyView:
        self.version += 1
        session = self.cloister.session("sus-owner")
        signed = sign_policy(self.policy(**changes), session.profile.owner_key())
        return session.transport.call("PUT", f"/datasets/{self.name}/policy", signed, PolicyView)

    def transport(self, user: str) -> Transport:
        return self.cloister.session(user).transport

    def ask(self, user: str, epsilon: float = 0.1) -> Release:
        question = Question.model_validate({"source": {"dataset": self.name}, "operation": "count"})
        request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=epsilon)
        return self.transport(user).call("POST", "/queries", request, Release)

    def long_plan(self, user: str) -> TrainingPlan:
        sources = ({"dataset": self.name, "part": "train"},)
        return make_plan(send_model(self.transport(user), network()), sources=sources, epochs=9000, epsilon=8.0)


def test_suspending_a_user_ends_their_jobs_alone_and_marked_steps_stay_spent(shared_cloister: RunningCloister) -> None:
    ward = Ward(shared_cloister)
    ann, bob = ward.transport("sus-ann"), ward.transport("sus-bob")
    jobs = {user: submit(ward.transport(user), ward.long_plan(user)).job for user in ("sus-ann", "sus-bob")}
    time.sleep(1)
    begun = time.monotonic()
    ward.put(suspended_users=("sus-ann",))
    # The answer to the owner comes when the job has ended.
    ended = ann.call("GET", f"/jobs/{jobs['sus-ann']}", None, JobView)
    assert time.monotonic() - begun < 10
    assert (ended.state, ended.code) == ("cancelled", "suspended")
    assert 0 < ended.charged_steps < ended.steps
    share, held = used(ann)[f"{ward.name}:sus-ann"]
    assert (share > 0, held) == (True, 0)
    with pytest.raises(PolicyRefusedError, match="suspended"):
        ward.ask("sus-ann")
    assert ann.call("GET", f"/datasets/{ward.name}", None, DatasetView).suspended
    # The positive control: the other one's job goes on, and so do the other one's questions.
    assert bob.call("GET", f"/jobs/{jobs['sus-bob']}", None, JobView).state == "running"
    assert ward.ask("sus-bob").charge.policies == {ward.name: 2}
    ward.put(suspended=True)
    assert wait(bob, jobs["sus-bob"]).code == "suspended"
    with pytest.raises(PolicyRefusedError, match="suspended"):
        ward.ask("sus-bob")
    ward.put()
    assert ward.ask("sus-ann").charge.policies == {ward.name: 4}
    assert used(ann)[f"{ward.name}:sus-ann"][0] >= share


def test_only_the_owners_signature_suspends(shared_cloister: RunningCloister) -> None:
    ward = Ward(shared_cloister)
    signed = sign_policy(
        ward.policy(suspended=True).model_copy(update={"version": 2}),
        shared_cloister.session("sus-ann").profile.owner_key(create=True),
    )
    for user, refused in (("admin", ForbiddenError), ("sus-ann", ForbiddenError), ("sus-owner", PolicyRefusedError)):
        with pytest.raises(refused):
            ward.transport(user).call("PUT", f"/datasets/{ward.name}/policy", signed, PolicyView)
    assert ward.ask("sus-ann").estimates


def test_no_training_slips_through_beside_a_suspension(shared_cloister: RunningCloister) -> None:
    """A policy that suspends, put while a training is prepared: it is refused, or stopped."""
    ward = Ward(shared_cloister)
    ann = ward.transport("sus-ann")
    plan = ward.long_plan("sus-ann")
    outcomes: list[JobView | CloisterError] = []

    def start() -> None:
        try:
            outcomes.append(submit(ann, plan))
        except CloisterError as error:
            outcomes.append(error)

    for delay in (0.0, 1.0):
        starter = threading.Thread(target=start)
        starter.start()
        time.sleep(delay)
        ward.put(suspended=True)
        starter.join()
        found = outcomes[-1]
        if isinstance(found, JobView):
            assert wait(ann, found.job, 10).code == "suspended"
        else:
            assert found.code in ("policy-refused", "conflict")
        ward.put()
    assert used(ann)[f"{ward.name}:sus-ann"][1] == 0


def test_a_group_shares_a_budget_through_the_product(shared_cloister: RunningCloister) -> None:
    team = {"team": Group(limit=Limit(epsilon=1, delta=1e-5), members=("sus-ann", "sus-bob"))}
    ward = Ward(shared_cloister, groups=team)
    release = ward.ask("sus-ann", 0.5)
    assert f"{ward.name}:@team" in release.charge.accounts
    before = used(ward.transport("sus-bob"))[f"{ward.name}:@team"]
    assert before[0] == pytest.approx(0.5, abs=0.01)
    # Lowered below what is spent: nothing more, at once; the guarantee stays what it was.
    lower = {"team": Group(limit=Limit(epsilon=0.25, delta=1e-5), members=("sus-ann", "sus-bob"))}
    ward.put(groups=lower)
    assert used(ward.transport("sus-bob"))[f"{ward.name}:@team"] == (1.0, 0.0)
    ward.put(users={"sus-ann": Limit(epsilon=40, delta=1e-5, epsilon_cap=0.3)})
    with pytest.raises(PolicyRefusedError, match="cap"):
        ward.ask("sus-ann", 0.5)
    assert ward.ask("sus-ann", 0.2).estimates
