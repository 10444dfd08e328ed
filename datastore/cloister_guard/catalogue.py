"""Datasets and their policies, as their owners publish them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister_budget.database import Database
from cloister_budget.entries import (
    MEMBERS_IN_A_LEAF,
    AccountLimit,
    LimitsSet,
    PolicySet,
    PopulationOpened,
    Uploaded,
    in_leaves,
)
from cloister_budget.journal import Journal
from cloister_budget.ledger import Ledger
from cloister_budget.limits import Bound, limits_of
from cloister_budget.tables import (
    Dataset,
    DatasetVersion,
    Owner,
    PolicyRow,
    Population,
    PopulationStatementRow,
    ReleaseRow,
)
from cloister_data.datasets import DatasetList, DatasetView, Declaration, PolicyView, UploadView
from cloister_data.errors import (
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    PolicyRefusedError,
    StorageError,
)
from cloister_data.framing import unpack_body
from cloister_data.owner import verify_policy, verify_statement
from cloister_data.policy import Policy, SignedPolicy
from cloister_data.populations import statement_about
from cloister_data.schema import Schema
from cloister_guard.access import visible_datasets
from cloister_guard.datasets.ingest import Format, add_places
from cloister_guard.datasets.store import DatasetStore, StoredFile
from cloister_guard.identity import Caller
from cloister_guard.owners import Owners
from cloister_guard.partition import check_nobody_moved, check_same_parts, part_units, versions_about


class Catalogue:
    """The datasets of one cloister."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        journal: Journal,
        owners: Owners,
        store: DatasetStore,
        read: Callable[[memoryview, Format, Schema], pa.Table],
        simulated: bool,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._journal = journal
        self._owners = owners
        self._store = store
        self._read = read
        self._simulated = simulated

    def list(self, caller: Caller) -> DatasetList:
        with self._database.read() as session:
            views = visible_datasets(session, caller, simulated=self._simulated)
        return DatasetList(datasets=tuple(view.model_copy(update=self._owners.standing(view.owner)) for view in views))

    def show(self, caller: Caller, name: str) -> DatasetView:
        for view in self.list(caller).datasets:
            if view.name == name:
                return view
        raise NotFoundError(
            f"There is no dataset {name!r} for you here.", next_step="cloister.datasets() lists those you may use."
        )

    def upload(self, caller: Caller, body: bytes) -> UploadView:
        """Publish a dataset's first or next version: `body` is a packed `Declaration` and the file's bytes.

        Everything is checked before anything is stored; the file is encrypted before it reaches the disk.
        """
        caller.require("owner")
        head, blob = unpack_body(body)
        declaration = Declaration.from_json(head)
        with self._database.read() as session:
            self._check(session, caller, declaration)
        self._owners.require((caller.user,))
        # Before the rows are read: an owner for whose data there is no key is refused here.
        split_key = self._store.split_key(declaration.population)
        table = add_places(
            self._read(blob, declaration.data_format, declaration.data_schema), declaration.data_schema, split_key
        )
        earlier: tuple[DatasetVersion, ...] = ()
        if declaration.data_schema.partition is not None:
            with self._database.read() as session:
                earlier = versions_about(session, declaration.population)
            check_nobody_moved(self._store, earlier, table, declaration.data_schema)
        witness = self._owners.witness(caller.user)
        stored = self._store.write(table, dataset=declaration.dataset)
        try:
            with self._database.write() as session:
                view = self._publish(session, caller, declaration, stored, table, earlier)
                if (witness is None) != (self._owners.witness(caller.user) is None):
                    raise ConflictError(
                        "A witness was named while the data were stored.",
                        why="They lie under the machine's own key, which no witness can withhold.",
                        next_step="Nothing was stored. Upload again.",
                    )
                return view
        except BaseException:
            self._store.discard(stored)
            raise

    def _check(self, session: Session, caller: Caller, declaration: Declaration) -> Policy | None:
        """The policy of a first version, verified, or None for a later version."""
        for name in (declaration.dataset, declaration.population):
            if name.split("/")[0] != caller.user:
                raise ForbiddenError(
                    f"{name!r} isn't yours.",
                    why=f"Your names begin with {caller.user + '/'!r}.",
                    next_step=f"Name it {caller.user}/{name.split('/')[1]}.",
                )
        pinned = session.get(Owner, caller.user)
        if pinned is not None and pinned.public_key != declaration.owner_key:
            raise PolicyRefusedError(
                "The upload is signed with another owner key than the one pinned here.",
                why="The key of the first upload is the only one that may speak for this owner.",
                next_step="Use the profile whose key made the first upload.",
            )
        check_same_parts(session, declaration.population, declaration.data_schema)
        existing = session.get(Dataset, declaration.dataset)
        if existing is not None:
            if existing.population != declaration.population:
                raise ConflictError(
                    "A new version must name the same population.",
                    why="Its people's accounts must go on.",
                    next_step=f"Declare population = {existing.population!r}.",
                )
            if declaration.policy is not None:
                raise ConflictError(
                    f"{declaration.dataset} has a policy already.",
                    next_step="Upload the data without one; change the policy with `cloister policy set`.",
                )
            if declaration.statement is not None:
                raise _superfluous()
            return None
        _check_population(session, caller.user, declaration)
        if declaration.policy is None:
            raise InvalidRequestError(
                "A dataset's first version needs a policy.",
                next_step="Give one: cloister dataset upload --policy FILE.",
            )
        policy = verify_policy(declaration.policy, declaration.owner_key)
        if policy.dataset != declaration.dataset or policy.version != 1:
            raise PolicyRefusedError(
                "The policy is for something else.",
                why=f"It names {policy.dataset} version {policy.version}.",
                next_step="The first policy of a dataset has version 1.",
            )
        return policy

    def _publish(
        self,
        session: Session,
        caller: Caller,
        declaration: Declaration,
        stored: StoredFile,
        table: pa.Table,
        earlier: tuple[DatasetVersion, ...],
    ) -> UploadView:
        # The lock lets an owner's uploads come one after the other: each knows all populations and versions before it.
        session.get(Owner, caller.user, with_for_update=True)
        policy = self._check(session, caller, declaration)
        parts = declaration.data_schema.parts
        # Nobody has moved since the versions that the rows were compared with; of a newer one, nobody knows.
        if parts and _files(versions_about(session, declaration.population)) != _files(earlier):
            raise ConflictError(
                f"Other data about the people of {declaration.population} were published meanwhile.",
                why="That everybody stayed in their part has to be checked against them too.",
                next_step="Nothing was stored. Upload again.",
            )
        now = int(time.time())
        if session.get(Owner, caller.user) is None:
            session.add(Owner(user=caller.user, public_key=declaration.owner_key))
        row = session.get(Dataset, declaration.dataset)
        if row is None:
            row = Dataset(
                name=declaration.dataset,
                owner=caller.user,
                population=declaration.population,
                version=0,
                policy_version=0,
            )
            session.add(row)
        row.version += 1
        session.flush()
        session.add(
            DatasetVersion(
                dataset=row.name,
                version=row.version,
                schema_json=declaration.data_schema.model_dump_json(),
                units=table.num_rows,
                part_units=part_units(table, parts),
                file=stored.file,
                wrapped_key=stored.wrapped_key,
                created=now,
            )
        )
        opened = session.get(Population, row.population) is None
        if policy is not None and declaration.policy is not None:
            self._put_policy(session, row, policy, declaration.policy, parts)
        if opened:
            self._log_opened(session, row, declaration)
        population = self._journal.ref(session, "population", row.population)
        # Its key is wrapped for whom the name says; the books must mean the same owner.
        opened_by = self._journal.books(session).populations[population].owner
        if opened_by != self._journal.ref(session, "user", row.owner):
            raise StorageError("The population was opened by another owner than the database says.")
        self._journal.append(
            session,
            Uploaded(
                dataset=self._journal.ref(session, "dataset", row.name),
                version=row.version,
                population=population,
                data_schema=declaration.data_schema.digest(),
                units=table.num_rows,
                owner_key=declaration.owner_key.hex(),
                keys="file" if self._owners.witness(row.owner) is None else "owner",
            ),
        )
        if policy is not None:
            self._log_policy(session, row, policy, declaration.owner_key)
        columns = tuple(column.name for column in declaration.data_schema.columns)
        return UploadView(dataset=row.name, version=row.version, rows=table.num_rows, columns=columns)

    def _put_policy(
        self, session: Session, row: Dataset, policy: Policy, signed: SignedPolicy, parts: tuple[str, ...] = ()
    ) -> None:
        row.policy_version = policy.version
        session.add(
            PolicyRow(
                dataset=row.name,
                version=policy.version,
                document=signed.document,
                signature=signed.signature,
                created=int(time.time()),
            )
        )
        session.flush()
        self._ledger.set_limits(session, row.population, policy, parts)

    def _log_opened(self, session: Session, row: Dataset, declaration: Declaration) -> None:
        population = session.get_one(Population, row.population)
        signed = declaration.statement
        if signed is not None:
            session.add(
                PopulationStatementRow(
                    population=population.name,
                    document=signed.document,
                    signature=signed.signature,
                    created=int(time.time()),
                )
            )
        self._journal.append(
            session,
            PopulationOpened(
                population=self._journal.ref(session, "population", population.name),
                owner=self._journal.ref(session, "user", row.owner),
                owner_key=declaration.owner_key.hex(),
                orders=population.orders,
                shares=population.deltas,
                parts=max(1, len(population.parts)),
                statement=None if signed is None else hashlib.sha256(signed.document).hexdigest(),
            ),
        )

    def _log_policy(self, session: Session, row: Dataset, policy: Policy, owner_key: bytes) -> None:
        """The policy's leaf and its limits', which are as many as there is room for in each."""
        parts = session.get_one(Population, row.population).parts
        pieces = list(
            in_leaves(
                each
                for one in limits_of(row.population, policy, parts)
                for each in self._entries(session, one, 0 if one.part is None else parts.index(one.part))
            )
        )
        dataset = self._journal.ref(session, "dataset", row.name)
        self._journal.append(
            session,
            PolicySet(
                dataset=dataset,
                version=policy.version,
                policy=policy.digest(),
                owner_key=owner_key.hex(),
                limits=len(pieces),
            ),
        )
        for piece in pieces:
            self._journal.append(session, LimitsSet(dataset=dataset, version=policy.version, limits=piece))

    def _entries(self, session: Session, bound: Bound, part: int) -> Iterator[AccountLimit]:
        members = tuple(self._journal.ref(session, "user", user) for user in bound.users)
        for at in range(0, max(1, len(members)), MEMBERS_IN_A_LEAF):
            yield AccountLimit(
                account=self._journal.ref(session, "account", bound.account),
                scope=bound.scope,
                part=part,
                limit=bound.limit,
                members=members[at : at + MEMBERS_IN_A_LEAF],
            )

    def policy(self, caller: Caller, name: str) -> PolicyView:
        """The signed policy in force, for its owner and for whoever it names."""
        with self._database.read() as session:
            row = session.get(Dataset, name)
            stored = session.get(PolicyRow, (name, row.policy_version)) if row is not None else None
            if row is None or stored is None:
                raise NotFoundError(f"There is no dataset {name!r} for you here.")
            signed = SignedPolicy(document=stored.document, signature=stored.signature)
            if caller.user != row.owner and caller.user not in signed.policy().readers:
                raise NotFoundError(f"There is no dataset {name!r} for you here.")
            return PolicyView(signed=signed, owner_key=session.get_one(Owner, row.owner).public_key)

    def set_policy(self, caller: Caller, name: str, signed: SignedPolicy) -> PolicyView:
        """Put the next version of a policy in force. The signature of the pinned key decides, not who is signed in."""
        caller.require("owner")
        with self._database.write() as session:
            return self.put_policy(session, caller, name, signed)

    def put_policy(self, session: Session, caller: Caller, name: str, signed: SignedPolicy) -> PolicyView:
        """The same within the caller's transaction. Locks the dataset: what is being charged for it comes before."""
        row = session.get(Dataset, name, with_for_update=True)
        if row is None or row.owner != caller.user:
            raise NotFoundError(f"There is no dataset {name!r} of yours here.")
        owner_key = session.get_one(Owner, row.owner).public_key
        policy = verify_policy(signed, owner_key)
        if policy.dataset != name or policy.version != row.policy_version + 1:
            raise PolicyRefusedError(
                "The policy is for something else.",
                why=f"It names {policy.dataset} version {policy.version}, and the next of {name} is version "
                f"{row.policy_version + 1}.",
                next_step="Read the policy in force (`cloister policy show`), change it, sign it again.",
            )
        self._put_policy(session, row, policy, signed)
        self._log_policy(session, row, policy, owner_key)
        return PolicyView(signed=signed, owner_key=owner_key)

    def discard_orphans(self) -> None:
        """Remove encrypted files that no row names: what a request left behind when the guard died in it."""
        with self._database.read() as session:
            known = {*session.scalars(select(DatasetVersion.file)), *session.scalars(select(ReleaseRow.file))}
        self._store.discard_all_but({file for file in known if file is not None})


def _files(versions: tuple[DatasetVersion, ...]) -> list[str]:
    return [version.file for version in versions]


def _check_population(session: Session, owner: str, declaration: Declaration) -> None:
    """A new population needs the owner's word that its people are others than in all populations before it.

    Raises PolicyRefusedError, or InvalidRequestError where the statement is missing or not needed.
    """
    known = sorted(
        session.scalars(select(Population.name).where(Population.name.startswith(f"{owner}/", autoescape=True)))
    )
    if not known or declaration.population in known:
        if declaration.statement is not None:
            raise _superfluous()
        return
    expected = statement_about(declaration.population, known)
    others = ", ".join(known[:8]) + (" and others" if len(known) > 8 else "")
    if declaration.statement is None:
        raise InvalidRequestError(
            f"{declaration.population} would be a new population, with fresh accounts.",
            why=f"The people of {others} have accounts already, and the same people must not get a second budget.",
            next_step="If these are the same people, name their population: --population NAME. If nobody is in both, "
            "say so under your signature: cloister dataset upload --other-people.",
        )
    if verify_statement(declaration.statement, declaration.owner_key) != expected:
        raise PolicyRefusedError(
            "The signed statement is about other populations.",
            why=f"It must be about {declaration.population}, and name all of yours that there are: {others}.",
            next_step="Upload again: cloister dataset upload --other-people signs it for the present ones.",
        )


def _superfluous() -> InvalidRequestError:
    return InvalidRequestError(
        "The upload opens no new population beside others, so there is nothing to state.",
        next_step="Leave the statement out: upload without --other-people.",
    )
