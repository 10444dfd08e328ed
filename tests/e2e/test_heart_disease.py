"""Four real hospitals: the UCI heart disease records (CC BY 4.0), each file uploaded by an owner of its own.

The folder is named by CLOISTER_DATA (default ../shared/data); without it the test is skipped, loudly.
"""

import os
import secrets
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from cloister.modeling import export_model, load_weights
from cloister.transport import Transport
from cloister_data.accounts import AccountList
from cloister_data.framing import pack_body
from cloister_data.release import Release
from cloister_data.schema import BooleanColumn, CategoryColumn, IntegerColumn, RealColumn, Schema
from cloister_data.statistics import QueryRequest, Question
from cloister_data.training import EvaluationRequest, JobView, ModelView, TrainingRequest
from tests.fakes.running import RunningCloister, make_policy

HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
FOLDER = Path(os.environ.get("CLOISTER_DATA", Path(__file__).parents[3] / "shared" / "data")) / "heart_disease"

pytestmark = pytest.mark.skipif(
    not all((FOLDER / f"processed.{name}.data").exists() for name in HOSPITALS),
    reason=f"the heart disease records are not in {FOLDER}: set CLOISTER_DATA to the folder that has them",
)

NAMES = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")

# Public bounds from the attributes' descriptions (heart-disease.names), not from the rows.
SCHEMA = Schema(
    description="UCI heart disease",
    columns=(
        IntegerColumn(name="age", low=18, high=100),
        BooleanColumn(name="sex", nullable=True),
        CategoryColumn(name="cp", categories=("1", "2", "3", "4"), nullable=True),
        RealColumn(name="trestbps", low=0, high=250, nullable=True),
        RealColumn(name="chol", low=0, high=700, nullable=True),
        BooleanColumn(name="fbs", nullable=True),
        CategoryColumn(name="restecg", categories=("0", "1", "2"), nullable=True),
        RealColumn(name="thalach", low=40, high=220, nullable=True),
        BooleanColumn(name="exang", nullable=True),
        RealColumn(name="oldpeak", low=-5, high=10, nullable=True),
        BooleanColumn(name="ill"),
    ),
)
FEATURES = tuple(column.name for column in SCHEMA.columns if column.name != "ill")
WIDTH = 8 + 4 + 3


def records(hospital: str) -> pd.DataFrame:
    raw = pd.read_csv(FOLDER / f"processed.{hospital}.data", header=None, na_values="?")
    rows = raw.iloc[:, :10].copy()
    rows.columns = pd.Index(NAMES)
    for name in ("sex", "cp", "fbs", "restecg", "exang"):
        rows[name] = rows[name].astype("Int64")
    rows["age"] = rows["age"].astype(int)
    rows["ill"] = (raw.iloc[:, 13] > 0).astype(int)
    return rows


@pytest.fixture(scope="module")
def doctor(shared_cloister: RunningCloister) -> Transport:
    shared_cloister.add_user("heart-doctor", "scientist")
    for hospital in HOSPITALS:
        name = f"{hospital}/heart"
        shared_cloister.upload(name, records(hospital), SCHEMA, make_policy(name, {"heart-doctor": 20.0}))
    return shared_cloister.session("heart-doctor").transport


def sources(part: str) -> list[dict[str, str]]:
    return [{"dataset": f"{hospital}/heart", "part": part} for hospital in HOSPITALS]


def test_statistics_of_each_hospital_are_close(doctor: Transport) -> None:
    for hospital in HOSPITALS:
        truth = records(hospital)
        for column, epsilon in (("age", 1.0), ("thalach", 2.0)):
            question = Question.model_validate(
                {"source": {"dataset": f"{hospital}/heart"}, "operation": "mean", "column": column}
            )
            request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=epsilon)
            (estimate,) = doctor.call("POST", "/queries", request, Release).estimates
            assert abs(estimate.value - truth[column].mean()) < 4 * estimate.error_95


def test_one_private_model_learns_from_four_hospitals_and_each_is_charged(doctor: Transport) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2))
    graph, weights = export_model(model, WIDTH)
    media = "application/vnd.cloister.model"
    sent = doctor.call("POST", "/models", pack_body(graph.to_json(), weights), ModelView, media)
    before = {view.account: view.used_share for view in doctor.call("GET", "/accounts", None, AccountList).accounts}
    request = TrainingRequest.model_validate(
        {
            "request_id": secrets.token_hex(16),
            "plan": {
                "sources": sources("train"), "model": sent.model, "features": FEATURES, "target": "ill",
                "loss": "cross_entropy", "optimizer": {"name": "adam", "lr": 0.03}, "epochs": 20,
                "batch_size": 150, "max_grad_norm": 1.0, "epsilon": 4.0,
            },
        }
    )  # fmt: skip
    job = doctor.call("POST", "/jobs", request, JobView)
    deadline = time.monotonic() + 120
    while job.state == "running" and time.monotonic() < deadline:
        time.sleep(0.2)
        job = doctor.call("GET", f"/jobs/{job.job}", None, JobView)
    assert job.state == "done"
    after = {view.account: view.used_share for view in doctor.call("GET", "/accounts", None, AccountList).accounts}
    charged = {account for account in after if after[account] > before[account]}
    names = [f"{hospital}/heart" for hospital in HOSPITALS]
    assert charged == {*names, *(f"{name}:heart-doctor" for name in names)}

    load_weights(model, doctor.raw("GET", f"/jobs/{job.job}/result"))
    graph, weights = export_model(model, WIDTH)
    sent = doctor.call("POST", "/models", pack_body(graph.to_json(), weights), ModelView, media)
    evaluation = EvaluationRequest.model_validate(
        {
            "request_id": secrets.token_hex(16),
            "plan": {
                "sources": sources("test"), "model": sent.model, "features": FEATURES, "target": "ill",
                "metric": "accuracy", "epsilon": 2.0,
            },
        }
    )  # fmt: skip
    (accuracy,) = doctor.call("POST", "/evaluations", evaluation, Release).estimates
    # Always saying "ill" would reach .55; without privacy a linear model reaches about .8.
    assert accuracy.value > 0.65
