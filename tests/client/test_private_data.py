"""The records' one door: read late and once, encoded by public constants, a patient as one unit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.noise import PrivateRandomness
from client.private_data import HoldOut, Nobody, PrivateRecords, scenario_records
from common.architectures import Architecture
from common.config import RunConfig
from common.datasets import load_private, load_public, sites
from common.distillation import build_learner
from common.errors import UserError
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records, concatenate


def patients(records: int, of: int | None = None, seed: int = 0, scale: float = 1.0) -> Records:
    rng = np.random.default_rng(seed)
    names = None if of is None else np.array([f"p{rng.integers(of)}" for _ in range(records)])
    target = rng.choice(["no", "yes", "yes"], size=records)
    return Records({"a": scale * rng.normal(size=records), "b": rng.normal(size=records)}, target, names, {})


def proxy(seed: int = 9) -> Proxy:
    public = patients(30, seed=seed)
    preprocessing = Preprocessing.fit(public, [NumericSpec(name="a"), NumericSpec(name="b")], ("no", "yes"))
    cases = preprocessing.encode(public)
    return Proxy(preprocessing, cases.x, cases.y)


class Counted:
    """Records that count how often they are read."""

    def __init__(self, records: Records) -> None:
        self.records, self.times = records, 0

    def __call__(self, complain: object) -> Records:
        self.times += 1
        return self.records


def learner(public: Proxy, features: str = "none"):
    return build_learner(Architecture("linear", features, 2), public, 0, ())


def test_nothing_is_read_before_a_reader_asks_and_then_once():
    read, public = Counted(patients(20)), proxy()
    records = PrivateRecords(read)
    assert read.times == 0
    for _ in range(3):
        records.for_private_step(public, learner(public), "record")
        records.for_label_histogram(public, "record", 1.0, PrivateRandomness())
    records.for_private_step(proxy(5), learner(proxy(5)), "record")
    assert read.times == 1


def test_values_are_scaled_by_the_proxys_constants_not_by_their_own():
    public = proxy()
    near, far = (PrivateRecords(Counted(patients(50, scale=scale))) for scale in (1.0, 3.0))
    near, far = (one.for_private_step(public, learner(public), "record").phi_ND for one in (near, far))
    assert far[:, 0].std() > 2 * near[:, 0].std()
    assert torch.equal(far[:, 1], near[:, 1])


def test_what_a_student_sees_follows_its_features_and_the_proxy():
    public, records = proxy(), PrivateRecords(Counted(patients(20)))
    plain = records.for_private_step(public, learner(public), "record").phi_ND
    turned = records.for_private_step(public, learner(public, "pca"), "record").phi_ND
    again = records.for_private_step(public, learner(public), "record").phi_ND
    assert not torch.equal(plain, turned) and torch.equal(plain, again)
    other = records.for_private_step(proxy(5), learner(proxy(5)), "record").phi_ND
    assert not torch.equal(plain, other)


def test_records_without_a_label_that_counts_are_left_out():
    some = patients(10)
    some.target[:3] = ["", "perhaps", ""]
    units = PrivateRecords(Counted(some)).for_private_step(proxy(), learner(proxy()), "record")
    assert len(units.y_N) == 7 and set(units.y_N.tolist()) <= {0, 1}


def test_a_patient_is_one_unit_with_all_records():
    public, some = proxy(), patients(200, of=40)
    units = PrivateRecords(Counted(some)).for_private_step(public, learner(public), "patient")
    assert len(units.count_U) == len(np.unique(some.patients)) and units.count_U.sum() == 200
    singly = PrivateRecords(Counted(some)).for_private_step(public, learner(public), "record")
    assert len(singly.count_U) == 200


def test_without_a_patient_column_there_is_no_promise_to_patients():
    records, public = PrivateRecords(Counted(patients(20))), proxy()
    with pytest.raises(UserError, match="no column says which records are of the same one"):
        records.for_private_step(public, learner(public), "patient")
    with pytest.raises(UserError, match="no column"):
        records.for_label_histogram(public, "patient", 1.0, PrivateRandomness())


@settings(max_examples=30)
@given(records=st.integers(0, 60), of=st.integers(1, 20))
def test_a_patient_adds_one_to_the_histogram_however_many_records(records, of):
    public, some = proxy(), patients(records, of=of)
    counts = PrivateRecords(Counted(some)).for_label_histogram(public, "patient", 50.0, PrivateRandomness())
    assert sum(counts) == len(np.unique(some.patients))  # at this ε the noise is 0 all but always


def test_the_histogram_has_noise_of_its_price():
    public, records = proxy(), PrivateRecords(Counted(patients(100)))
    truth = np.bincount(records.for_private_step(public, learner(public), "record").y_N, minlength=2)
    drawn = np.array(
        [records.for_label_histogram(public, "record", 0.5, PrivateRandomness()) for _ in range(2000)]
    )
    noise = drawn - truth
    assert np.abs(noise.mean(axis=0)).max() < 0.3
    p = np.exp(-0.5)
    assert noise.std() == pytest.approx(np.sqrt(2 * p) / (1 - p), rel=0.1)


def test_nobody_has_no_records_and_the_same_noise():
    public = proxy()
    for unit in ("record", "patient"):
        assert len(Nobody().for_private_step(public, learner(public), unit).y_N) == 0
        counts = Nobody().for_label_histogram(public, unit, 0.1, PrivateRandomness())
        assert len(counts) == 2 and counts != (0, 0)


def test_complaints_about_the_schema_quote_no_value():
    wrong = Records({"a": np.array(["303.25", "x"])}, np.array(["no", "yes"]), None, {})
    complaints = PrivateRecords(Counted(wrong)).for_schema_check([proxy().preprocessing])
    assert complaints and "303" not in " ".join(complaints)


@settings(max_examples=20)
@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_who_is_held_out_is_never_trained_on_and_stays_so(share, seed):
    some, public, hold_out = patients(60, of=25, seed=seed), proxy(), HoldOut(b"key", share)
    held = hold_out.takes(some)
    for patient in np.unique(some.patients):
        assert len(set(held[some.patients == patient])) == 1
    units = PrivateRecords(Counted(some), hold_out).for_private_step(public, learner(public), "record")
    assert len(units.y_N) == (~held).sum()
    fewer = some.take(np.arange(0, 60, 2))
    assert (hold_out.takes(fewer) == held[::2]).all()


def test_a_simulated_site_reads_its_own_share():
    config = RunConfig()
    public = load_public(config).proxy
    for site in sites(config):
        units = scenario_records(config, site.name).for_private_step(public, learner(public), "record")
        assert len(units.y_N) == len(load_private(config, site.name))


def test_records_without_a_patient_id_are_nobodys_and_change_nothing():
    # Together they would be one unit, and one more of them would take another's place in a draw.
    known = patients(20, of=6)
    nameless = [
        Records({"a": np.zeros(n), "b": np.ones(n)}, np.full(n, "yes"), np.full(n, ""), {}) for n in (1, 3)
    ]
    public = proxy()
    alone = PrivateRecords(lambda _: known).for_private_step(public, learner(public), "patient")
    for more in nameless:
        both = concatenate([known, more])
        units = PrivateRecords(lambda _, both=both: both).for_private_step(public, learner(public), "patient")
        assert torch.equal(units.phi_ND, alone.phi_ND) and torch.equal(units.y_N, alone.y_N)
        assert (units.count_U == alone.count_U).all()
