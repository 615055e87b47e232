"""The policy: strict at the door, first objection wins, and no plan, however odd, makes it stumble."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.policy import read_policy
from common.architectures import Architecture
from common.errors import UserError
from common.messages import Rule

STUDENT = {
    "temperature": 2.0,
    "alpha": 1.0,
    "epochs": 50,
    "learning_rate": 0.01,
    "weight_decay": 0.001,
    "model": "linear",
    "features": "none",
    "feature_size": 128,
    "private_layers": "head",
}


def test_what_site_init_writes_is_a_policy(hospital):
    policy = read_policy(hospital.policy_path)
    assert policy.site == "north"
    assert policy.data.declared_size == 50
    assert Path(policy.state) == hospital.folder / "state"
    assert policy.refusal(hospital.plan()) is None


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ('unit = "patient"', "", "data.unit"),
        ("declared-size = 50", "", "data.declared-size"),
        ("declared-size = 50", "declared-size = 0", "data.declared-size"),
        ("declared-size = 50", 'declared-size = "50"', "data.declared-size"),
        ("lifetime-epsilon = 3.0", "", "budget.lifetime-epsilon"),
        ("lifetime-epsilon = 3.0", "lifetime-epsilon = inf", "budget.lifetime-epsilon"),
        ("lifetime-epsilon = 3.0", "lifetime-epsilon = nan", "budget.lifetime-epsilon"),
        ("delta = 1e-05", "delta = 1.0", "budget.delta"),
        ("approval = false", "aproval = false", "aproval"),
        ("every-seconds = 0.0", "", "replies.every-seconds"),
        ("[replies]", "[reply]", "repl"),
        ("rounds = 200", "rounds = 200.5", "allow.rounds"),
        ('listen = "unix:', 'listen = "', "service.listen"),
        (
            'listen = "unix:',
            'listen = "tcp:0.0.0.0:1',
            "service.listen.*expected unix:PATH, or tcp:",
        ),
        ('listen = "unix:', f'listen = "unix:/{"x" * 200}', "service"),
        ('site = "north"', 'site = "the north"', "site"),
        ('site = "north"', "site = north", "TOML"),
    ],
)
def test_a_policy_that_is_not_right_is_refused_by_key(hospital, before, after, named):
    hospital.amend({before: after})
    with pytest.raises(UserError, match=named):
        read_policy(hospital.policy_path)


def test_tcp_needs_certificates(hospital):
    hospital.amend({f'"unix:{hospital.folder}/door.sock"': '"tcp:127.0.0.1:7443"'})
    with pytest.raises(UserError, match="certificate"):
        read_policy(hospital.policy_path)


def test_no_policy_no_service(tmp_path):
    with pytest.raises(UserError, match="no policy, no service"):
        read_policy(tmp_path / "site.toml")
    (tmp_path / "site").mkdir(mode=0o700)
    with pytest.raises(UserError, match="site can't be read: Is a directory"):
        read_policy(tmp_path / "site")


def test_a_policy_as_a_windows_editor_saves_it(hospital):
    before = read_policy(hospital.policy_path)
    body = hospital.policy_path.read_bytes()
    hospital.policy_path.write_bytes(b"\xef\xbb\xbf" + body.replace(b"\n", b"\r\n"))
    assert read_policy(hospital.policy_path) == before


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
@pytest.mark.parametrize("file", ["site.toml", "data.toml"])
def test_a_file_that_others_can_write_is_refused(hospital, file, mode):
    (hospital.folder / file).chmod(mode)
    with pytest.raises(UserError, match=f"{file}: others can write it.*chmod go-w"):
        read_policy(hospital.policy_path)


def test_a_folder_that_others_can_write_is_refused(hospital):
    hospital.folder.chmod(0o770)
    with pytest.raises(UserError, match="others can write it"):
        read_policy(hospital.policy_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_account_is_refused(hospital):
    os.chown(hospital.folder, 12345, 12345)
    with pytest.raises(UserError, match=r"belongs to the account 12345: .*sudo -u 12345"):
        read_policy(hospital.policy_path)


@pytest.mark.parametrize(
    ("amendment", "plan", "objection"),
    [
        ({'studies = ["*"]': 'studies = ["study-2"]'}, {}, "allow.studies does not list study"),
        ({'methods = ["descent", "oneshot", "fedmd"]': 'methods = ["fedmd"]'}, {}, "allow.methods does not"),
        ({}, {"student": STUDENT | {"model": "os:system"}}, "does not list 'os:system' behind"),
        (
            {'models = ["linear", "mlp", "cnn", "resnet-gn", "text"]': 'models = ["*"]'},
            {"student": STUDENT | {"model": "os:system"}},
            "does not list 'os:system' behind",
        ),
        ({}, {"student": STUDENT | {"model": "transformer"}}, "does not list 'transformer' behind"),
        ({}, {"student": STUDENT | {"model": "\x1b[2J\nfine"}}, r"does not list '\x1b[2J\nfine' behind"),
        (
            {'features = ["none", "pca", "scattering", "words"]': 'features = ["pca"]'},
            {"student": STUDENT},
            f"behind {STUDENT['features']}",
        ),
        ({}, {"student": STUDENT | {"epochs": 1001}}, "1001 epochs are more than allow.epochs"),
        ({'proxies = ["*"]': f'proxies = ["{"0" * 64}"]'}, {}, "allow.proxies does not list"),
        ({}, {"codec": "fp32"}, "allow.codecs does not list fp32"),
        ({}, {"rounds": 201}, "201 rounds are more than allow.rounds = 200"),
        ({}, {"steps_per_round": 10_000}, "10000 steps a round are more than allow.steps-per-round"),
        ({}, {"clipping_norm": 1e5}, "clipping norm 100000 is above allow.clipping-norm"),
        ({}, {"unit": "record"}, "unit record is not data.unit = patient"),
        ({}, {"delta": 1e-4}, "δ = 0.0001 is above budget.delta = 1e-05"),
        ({}, {"epsilon": 1.001}, "ε = 1.001 is above budget.run-epsilon = 1"),
        ({}, {"histogram_share": 0.1}, "allow.purchases does not list all of"),
        ({"noise-multiplier = 0.5": "noise-multiplier = 50.0"}, {}, "σ is below allow.noise-multiplier = 50"),
    ],
)
def test_each_rule_refuses(hospital, amendment, plan, objection):
    hospital.amend(amendment)
    refused = read_policy(hospital.policy_path).refusal(hospital.plan(**plan))
    assert refused is not None
    rule, reason = refused
    assert rule is Rule.NOT_ALLOWED
    assert objection in reason
    assert "{" not in reason


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('"fedmd"]', '"fedmd", "decent"]', r"allow\.methods.*there is no 'decent'"),
        ('codecs = ["', 'codecs = ["int9", "', r"allow\.codecs.*there is no 'int9'"),
        ("purchases = []", 'purchases = ["histogram"]', r"allow\.purchases.*label-histogram"),
        ('proxies = ["*"]', 'proxies = ["abc"]', r"allow\.proxies.*'abc' is neither"),
        ("rounds = 200", "roundz = 200", r"allow\.roundz = 200 is refused.*did you mean allow\.rounds\?"),
    ],
)
def test_what_no_plan_can_ever_ask_for_is_a_slip_of_the_pen(hospital, before, after, complaint):
    hospital.amend({before: after})
    with pytest.raises(UserError, match=complaint):
        read_policy(hospital.policy_path)


def test_a_refusal_tells_the_person_at_the_site_what_was_asked(hospital):
    policy = read_policy(hospital.policy_path)
    assert policy.refusal(hospital.plan(epsilon=1.001))[1] == "ε = 1.001 is above budget.run-epsilon = 1"
    bought = policy.refusal(hospital.plan(histogram_share=0.1))[1]
    assert bought == "allow.purchases does not list all of label-histogram"


def test_code_by_import_path_runs_only_where_the_policy_names_it(hospital):
    own = hospital.plan(student=STUDENT | {"model": "our.models:Tiny"})
    assert read_policy(hospital.policy_path).refusal(own) is not None
    hospital.amend({'models = ["linear",': 'models = ["our.models:Tiny", "linear",'})
    assert read_policy(hospital.policy_path).refusal(own) is None


def test_a_student_of_the_sites_own_replaces_the_proposed_one(hospital):
    with hospital.policy_path.open("a") as file:
        file.write('\n[student]\nmodel = "mlp"\nfeatures = "pca"\nfeature-size = 2\nprivate-layers = "all"\n')
    policy = read_policy(hospital.policy_path)
    assert policy.refusal(hospital.plan(student=STUDENT | {"model": "os:system"})) is None
    assert policy.architecture(Architecture("os:system")) == Architecture("mlp", "pca", 2, "all")


EXTREME_BUT_ALLOWED = st.fixed_dictionaries(
    {
        "rounds": st.integers(1, 200),
        "steps_per_round": st.integers(1, 100),
        "sample_rate": st.sampled_from([1.0, 1e-5]) | st.floats(1e-5, 1),
        "epsilon": st.sampled_from([5e-324, 1e-9]) | st.floats(0, 1, exclude_min=True),
        "delta": st.sampled_from([5e-324, 1e-300]) | st.floats(0, 1e-5, exclude_min=True),
        "histogram_share": st.sampled_from([0.0, 1 - 2**-53]) | st.floats(0, 1, exclude_max=True),
    }
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=EXTREME_BUT_ALLOWED)
def test_no_plan_makes_the_policy_stumble_or_reckon_for_long(hospital, changes):
    text = hospital.policy_path.read_text().replace("purchases = []", 'purchases = ["*"]')
    hospital.policy_path.write_text(text)
    policy = read_policy(hospital.policy_path)
    began = time.monotonic()
    policy.refusal(hospital.plan(**changes))
    assert time.monotonic() - began < 20
