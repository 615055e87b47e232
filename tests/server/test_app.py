"""The coordinator from start to end, with the real ClientApp behind it: sound, broken and hostile sites."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from scipy.special import softmax

from client.app import app as real_app
from client.simulated import simulated_site
from common.codec import CODECS
from common.config import RunConfig
from common.envelope import DELIVER, FIELD, LEARN, OFFER, PROXY, RECORD, seal, unseal
from common.errors import UserError
from common.messages import Greeting, Receipt, Refusal, Release, Rule, Task, decode_answer
from common.plan import plan_of
from common.proxy import Proxy
from server.app import draw_up
from simulations import inprocess

HUNGARY = 1
"""Place of the site that misbehaves."""
OTHERS = ("cleveland", "long-beach", "switzerland")
SECRET = "patient 7 has a narrowing"

Answer = Callable[[Message, Message, Context], Message]
"""From the message that came, the site's true reply and its context to what it sends."""


class Courier(ClientApp):
    """The real ClientApp, but one site answers one kind of message in its own way."""

    def __init__(
        self, answer: Answer, action: str = LEARN, rounds: Iterable[int] = (), place: int = HUNGARY
    ) -> None:
        super().__init__()
        self.answer, self.action, self.rounds, self.place = answer, action, set(rounds), place

    def __call__(self, message: Message, context: Context) -> Message:
        here = context.node_config["partition-id"] == self.place
        if not here or message.metadata.message_type != self.action:
            return real_app(message, context)
        number = Task.decode(unseal(message.content)).round if self.action == LEARN else 0
        if self.rounds and number not in self.rounds:
            return real_app(message, context)
        return self.answer(message, real_app(message, context), context)


def content(make: Callable[[bytes], RecordDict]) -> Answer:
    return lambda message, reply, _: Message(make(unseal(reply.content)), reply_to=message)


def body(change: Callable[[bytes], bytes]) -> Answer:
    return content(lambda true: seal(change(true)))


def release(**changes: object) -> Answer:
    return body(lambda true: replace(Release.decode(true), **changes).encode())


def huge_claim(true: bytes) -> bytes:
    return true[:13] + (2**31).to_bytes(4, "little") + true[17:]


def in_codec(name: str) -> Answer:
    def change(true: bytes) -> bytes:
        said = Release.decode(true)
        scale, payload = CODECS[name].encode(said.logits())
        return replace(said, codec=name, scale=scale, payload=payload).encode()

    return body(change)


def fewer_cases(true: bytes) -> bytes:
    said = Release.decode(true)
    return replace(said, cases=said.cases - 1, payload=said.payload[said.classes :]).encode()


def raises(message: Message, reply: Message, context: Context) -> Message:
    raise ValueError(SECRET)


def says_nothing(message: Message, reply: Message, context: Context) -> Message:
    earlier = Message(RecordDict(), 1, LEARN)
    earlier.metadata.__dict__["_message_id"] = "of an earlier round"
    earlier.metadata.__dict__["_dst_node_id"] = context.node_id
    return Message(reply.content, reply_to=earlier)


HOSTILE: dict[str, tuple[Answer, str]] = {
    "raises": (raises, "its client app failed (Flower's error code 2)"),
    "garbage": (body(lambda _: b"\x00" * 489), "a malformed answer"),
    "text": (body(lambda _: SECRET.encode()), "a malformed answer"),
    "empty": (body(lambda _: b""), "a malformed answer"),
    "cut-short": (body(lambda true: true[:-1]), "a malformed release"),
    "too-long": (body(lambda true: true + b"\0"), "a malformed release"),
    "huge": (body(lambda true: true + bytes(30_000_000)), "a malformed answer"),
    "claims-to-be-huge": (body(huge_claim), "a malformed answer"),
    "no-record": (content(lambda _: RecordDict()), "a malformed answer"),
    "other-record": (content(lambda _: RecordDict({"m": MetricRecord({"loss": 0.1})})), "a malformed answer"),
    "one-field-more": (
        content(lambda true: RecordDict({RECORD: ConfigRecord({FIELD: true, "loss": 0.1})})),
        "a malformed answer",
    ),
    "scale-nan": (release(scale=float("nan")), "a malformed release"),
    "scale-inf": (release(scale=float("inf")), "a malformed release"),
    "scale-vast": (release(scale=1e30), "a malformed release"),
    "scale-negative": (release(scale=-1.0), "a malformed release"),
    "other-task": (release(task_digest=bytes(32)), "about another task"),
    "other-proxy": (release(proxy_digest=bytes(32)), "about another proxy"),
    "other-round": (release(round=9), "a release of round 9, while round"),
    "other-codec": (in_codec("fp16"), "in another codec"),
    "other-shape": (body(fewer_cases), "of another shape"),
    "more-steps": (release(steps=7), "another number of private steps"),
    "unasked-counts": (release(counts=(303, 2)), "statistics that nobody asked for"),
    "greeting": (body(lambda _: Greeting("hungary", 150, 1.0, 9, True).encode()), "of another kind"),
    "receipt": (body(lambda _: Receipt(bytes(32)).encode()), "of another kind"),
    "refusal": (body(lambda _: Refusal(Rule.NOT_APPROVED).encode()), "refused: not-approved"),
}


@pytest.fixture(scope="module")
def without_hungary(run_app):
    """The models that the other three make."""
    courier = Courier(body(lambda _: Refusal(Rule.NOT_ALLOWED).encode()))
    return run_app(client_app=courier).models


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_broken_or_hostile_site_costs_its_own_contribution_and_is_named(run_app, without_hungary, kind):
    answer, reason = HOSTILE[kind]
    outcome = run_app(client_app=Courier(answer))
    for line in outcome.summary.history:
        assert line.answered == OTHERS
        assert [one.site for one in line.left_out] == ["hungary"]
        assert reason in line.left_out[0].reason
    assert outcome.models == without_hungary
    for file in ("summary.json", "report.html", "rounds.jsonl"):
        assert SECRET not in (outcome.folder / file).read_text()
    # It may have spent its budget, whatever it says.
    assert outcome.epsilon("hungary") == outcome.epsilon("cleveland") > 0.9


def test_what_breaks_inside_a_custodian_is_the_sites_own_business(run_app, without_hungary, caplog):
    def break_it(message: Message, reply: Message, context: Context) -> Message:
        simulated_site(context).ledger.close()
        return reply

    outcome = run_app(client_app=Courier(break_it, OFFER))
    assert outcome.left_out(1) == {"hungary": "refused: unavailable"}
    assert outcome.models == without_hungary
    assert "the custodian gives no answer" in caplog.text


def test_values_that_are_not_finite_are_no_contribution(run_app):
    nan = np.full((184, 2), np.nan, dtype="<f4").tobytes()
    outcome = run_app({"codec": "fp32"}, Courier(release(payload=nan)))
    assert "a malformed release: a value is not finite" in outcome.left_out(1)["hungary"]


def test_a_site_that_answers_twice_counts_once(run_app, monkeypatch):
    class Echoing(inprocess.InProcessGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
            replies = super().pull_messages(message_ids)
            again = [one for one in replies if one.metadata.src_node_id == inprocess.FIRST_NODE_ID + HUNGARY]
            return replies + again

    undisturbed = run_app()
    monkeypatch.setattr(inprocess, "InProcessGrid", Echoing)
    outcome = run_app()
    assert outcome.left_out(1) == {}
    assert outcome.models == undisturbed.models


def test_a_site_that_misses_a_round_is_back_in_the_next(run_app):
    outcome = run_app({"num-rounds": 3, "round-timeout": 0.5}, Courier(says_nothing, rounds=[2]))
    assert outcome.left_out(1) == outcome.left_out(3) == {}
    assert outcome.left_out(2) == {"hungary": "no answer in time"}
    assert [len(line.answered) for line in outcome.summary.history] == [4, 3, 4]
    assert outcome.epsilon("hungary") == outcome.epsilon("cleveland")


def test_class_weights_do_without_a_histogram_that_never_came(run_app):
    changes = {"method": "fedmd", "aggregation.rule": "class-weighted", "round-timeout": 0.5}
    outcome = run_app(changes, Courier(says_nothing, rounds=[1]))
    assert [len(line.answered) for line in outcome.summary.history] == [3, 4]


# ---- Roll call ----


def learn_replies(outcome_replies) -> int:
    return sum(reply.metadata.message_type == LEARN for reply, _ in outcome_replies)


@pytest.mark.parametrize(
    ("answer", "action", "reason"),
    [
        (raises, OFFER, "its client app failed"),
        (body(lambda _: b"hello"), OFFER, "a malformed answer"),
        (body(lambda _: Receipt(bytes(32)).encode()), OFFER, "an answer about something else"),
        (
            body(lambda _: Greeting("cleveland", 1, 1.0, 9, True).encode()),
            OFFER,
            "calls itself cleveland, as another",
        ),
        (body(lambda _: Greeting("hungary", 0, 1.0, 9, True).encode()), OFFER, "a declared size of 0"),
    ],
)
def test_a_site_that_fails_at_roll_call_is_left_out_with_the_reason(run_app, answer, action, reason):
    outcome = run_app(client_app=Courier(answer, action))
    for line in outcome.summary.history:
        assert line.answered == OTHERS
        reasons = {one.site: one.reason for one in line.left_out}
        assert reasons.keys() <= {"hungary", "node 3"} and reason in " ".join(reasons.values())
    assert [line.site for line in outcome.summary.privacy] == list(OTHERS)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (raises, "did not take the proxy: its client app failed"),
        (body(lambda _: Receipt(bytes(32)).encode()), "did not take the proxy"),
        (body(lambda _: Refusal(Rule.MALFORMED).encode()), "did not take the proxy: refused: malformed"),
    ],
)
def test_a_site_whose_receipt_was_lost_joins_after_the_first_round(run_app, answer, reason):
    outcome = run_app(client_app=Courier(answer, PROXY))
    assert reason in outcome.left_out(1)["hungary"]
    assert outcome.left_out(2) == {}
    assert len(outcome.summary.privacy) == 4


def test_a_site_whose_proxy_differs_refuses_with_both_digests(run_app):
    digests: list[str] = []

    def mislaid(message: Message, reply: Message, context: Context) -> Message:
        proxy = Proxy.from_bytes(unseal(message.content))
        other = Proxy(proxy.preprocessing, proxy.x + np.float32(0.5), proxy.y)
        digests.extend((proxy.digest.hex(), other.digest.hex()))
        shelf = simulated_site(context).shelf
        for path in shelf.proxies.glob("*.safetensors"):
            path.unlink()
        shelf.keep_proxy(other, other.to_bytes())
        return reply  # and says that it has the right one

    outcome = run_app(client_app=Courier(mislaid, PROXY, place=3))
    reason = outcome.left_out(1)["long-beach"]
    assert reason.startswith("refused: unknown-proxy")
    assert all(digest[:16] in reason for digest in digests)


# ---- Sites that are late, drop out, or give less ----


def test_sites_join_late_and_drop_out_and_the_run_is_none_the_worse(run_app):
    """Hungary's node fails at the door until round 5 is over; Cleveland's fails in rounds 8 to 12."""
    asked: list[int] = []

    class Unreliable(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            place, learns = context.node_config["partition-id"], message.metadata.message_type == LEARN
            if learns:
                asked.append(Task.decode(unseal(message.content)).round)
            if place == HUNGARY and max(asked, default=0) < 5:
                raise ValueError(SECRET)
            if learns and place == 0 and 8 <= asked[-1] <= 12:
                raise ValueError(SECRET)
            return real_app(message, context)

    outcome = run_app({"num-rounds": 20}, Unreliable())
    answered = [line.answered for line in outcome.summary.history]
    assert answered[:5] == [OTHERS] * 5
    assert answered[5] == answered[6] == answered[-1] == ("cleveland", "hungary", "long-beach", "switzerland")
    assert answered[7:12] == [("hungary", "long-beach", "switzerland")] * 5
    # The whole plan of each is charged, whatever it took part in.
    assert outcome.epsilon("hungary") == outcome.epsilon("cleveland") > 0.97
    assert outcome.auroc > run_app({"num-rounds": 20}).auroc - 0.01


def test_each_site_gives_what_its_own_budget_allows(run_app):
    outcome = run_app({"privacy.epsilon": 3.0, "privacy.site-epsilons": "0.3,1,3", "num-rounds": 5})
    lines = {line.site: line for line in outcome.summary.privacy}
    for site, cap in {"cleveland": 0.3, "hungary": 1.0, "switzerland": 3.0, "long-beach": 0.3}.items():
        assert 0.97 * cap < lines[site].epsilon <= cap
    sigma = {site: line.noise_multiplier for site, line in lines.items()}
    assert sigma["cleveland"] == sigma["long-beach"] > sigma["hungary"] > sigma["switzerland"]
    spent = [line.epsilon_spent for line in outcome.summary.history]
    assert spent == sorted(spent) and spent[-1] == lines["switzerland"].epsilon
    assert all(len(line.answered) == 4 for line in outcome.summary.history)


def test_a_site_that_allows_fewer_rounds_stops_by_itself_and_gets_the_student(run_app):
    def allow_two(message: Message, reply: Message, context: Context) -> Message:
        site = simulated_site(context)
        allow = site.policy.allow.model_copy(update={"rounds": 2})
        site.policy = site.policy.model_copy(update={"allow": allow})
        return real_app(message, context)

    outcome = run_app({"num-rounds": 4}, Courier(allow_two, OFFER))
    assert [line.answered == OTHERS for line in outcome.summary.history] == [False, False, True, True]
    assert outcome.left_out(3) == {"hungary": "its own plan ended with round 2"}
    # Its ε buys two rounds instead of four, with less noise in each.
    lines = {line.site: line for line in outcome.summary.privacy}
    assert lines["hungary"].noise_multiplier < lines["cleveland"].noise_multiplier
    assert 0.97 < lines["hungary"].epsilon <= 1.0
    student = outcome.folder / "sites" / "hungary" / "student.safetensors"
    assert student.read_bytes() == outcome.models["student"]


def test_several_private_steps_a_round_cost_what_as_many_rounds_cost(run_app):
    outcome = run_app({"num-rounds": 5, "privacy.steps-per-round": 4})
    (sigma,) = {line.noise_multiplier for line in outcome.summary.privacy}
    (as_rounds,) = {line.noise_multiplier for line in run_app({"num-rounds": 20}).summary.privacy}
    assert sigma == as_rounds
    assert outcome.auroc > outcome.summary.results.teacher_alone["auroc"].mean - 0.01


# ---- What public validation chooses ----


def test_validation_shortens_steps_that_are_too_long(run_app):
    wild = {"privacy.step-size": 100.0, "aggregation.momentum": 0.9, "num-rounds": 6}
    unseen, validated = run_app(wild), run_app(wild | {"aggregation.validated": True})
    assert validated.auroc > unseen.auroc + 0.005
    # It is free: the same answers at the same price.
    assert validated.epsilon("hungary") == unseen.epsilon("hungary")


def test_a_run_that_stalls_ends_early_with_its_best_round_and_the_whole_plan_is_charged(run_app):
    wild = {"privacy.step-size": 100.0, "aggregation.momentum": 0.9, "num-rounds": 12}
    outcome = run_app(wild | {"patience": 2})
    summary = outcome.summary
    assert 3 <= summary.rounds < 12 == summary.rounds_planned
    assert len(summary.history) == summary.rounds
    assert outcome.epsilon("hungary") == run_app({"num-rounds": 12}).epsilon("hungary") > 0.97
    best = summary.history[-3].metrics["auroc"]
    assert summary.results.federation["auroc"].mean == pytest.approx(best, abs=1e-3)
    assert f"{summary.rounds} of 12 rounds" in (outcome.folder / "report.html").read_text()


# ---- Too few sites ----


def test_too_few_sites_at_roll_call_stop_the_run_before_anybody_pays(run_app, tmp_path):
    asked = []

    class Counting(Courier):
        def __call__(self, message: Message, context: Context) -> Message:
            asked.append(message.metadata.message_type)
            return super().__call__(message, context)

    changes = {"min-sites": 4, "out": str(tmp_path)}
    with pytest.raises(
        UserError, match=r"roll call: 3 sites took part, min-sites is 4.*hungary: did not take"
    ):
        run_app(changes, Counting(raises, PROXY))
    assert LEARN not in asked
    assert not list(tmp_path.iterdir())


def test_too_few_sites_in_a_round_stop_the_run_and_leave_no_results(run_app, tmp_path):
    changes = {"min-sites": 4, "out": str(tmp_path), "num-rounds": 3}
    with pytest.raises(
        UserError, match=r"round 2: 3 sites took part, min-sites is 4.*hungary: its client app"
    ):
        run_app(changes, Courier(raises, rounds=[2]))
    assert not list(tmp_path.iterdir())


# ---- Budgets ----


def test_a_site_whose_budget_is_spent_goes_on_without_private_steps(run_app, without_hungary):
    def spend(message: Message, reply: Message, context: Context) -> Message:
        site = simulated_site(context)
        budget = site.policy.budget.model_copy(update={"lifetime_epsilon": 1e-6, "study_epsilon": 1e-6})
        site.policy = site.policy.model_copy(update={"budget": budget})
        return reply

    outcome = run_app(client_app=Courier(spend, OFFER))
    for line in outcome.summary.history:
        assert line.answered == OTHERS
        assert line.left_out[0].site == "hungary" and "budget is spent" in line.left_out[0].reason
    assert outcome.models == without_hungary
    assert outcome.epsilon("hungary") == 0 and outcome.epsilon("cleveland") > 0.9
    # It answers all the same, in as many bytes but for the payload, and gets the student.
    said = [unseal(reply.content) for reply, _ in outcome.replies if reply.metadata.message_type == LEARN]
    assert len(said) == 8 and len({len(one) - len(Release.decode(one).payload) for one in said}) == 1
    steps = sorted(decode_answer(one).steps for one in said)
    assert steps == [0, 0, 1, 1, 1, 1, 1, 1]
    students = sorted((outcome.folder / "sites").glob("*/student.safetensors"))
    assert [path.parent.name for path in students] == ["cleveland", "hungary", "long-beach", "switzerland"]
    assert {path.read_bytes() for path in students} == {outcome.models["student"]}


def test_a_site_that_does_not_take_the_final_student_does_not_spoil_the_run(run_app, caplog):
    run_app(client_app=Courier(raises, DELIVER))
    assert "hungary has not got the final student: its client app failed" in caplog.text


def test_epsilon_grows_round_by_round_to_that_of_the_plan(run_app):
    summary = run_app({"num-rounds": 4}).summary
    spent = [line.epsilon_spent for line in summary.history]
    assert spent == sorted(spent) and 0 < spent[0] < 0.7
    assert {line.epsilon for line in summary.privacy} == {spent[-1]}
    assert 0.97 < spent[-1] <= 1.0
    assert {line.accountant for line in summary.privacy} == {"gaussian-exact"}


def test_sampling_is_accounted_for_by_privacy_loss_distributions(run_app):
    summary = run_app({"privacy.sample-rate": 0.5}).summary
    assert {line.accountant for line in summary.privacy} == {"pld"}
    assert all(0.97 < line.epsilon <= 1.0 for line in summary.privacy)


# ---- Ways to run it ----


def test_without_a_teacher_z_starts_at_zero(run_app):
    outcome = run_app({"teacher.model": "none", "data.proxy-labels": 0, "num-rounds": 10})
    results = outcome.summary.results
    assert results.teacher_alone is None and results.public_only is None
    assert results.public_only_if_labelled is not None
    assert outcome.auroc > 0.8
    assert outcome.summary.public.proxy_labelled == 0


def test_a_teacher_that_was_loaded_is_the_one_that_was_saved(run_app):
    first = run_app()
    path = str(first.folder / "teacher.safetensors")
    second = run_app({"teacher.path": path, "data.proxy-labels": 0})
    assert second.summary.results.teacher_alone == first.summary.results.federation


def test_mixed_students_learn_together(run_app):
    outcome = run_app({"students": "mixed", "num-rounds": 5})
    assert outcome.auroc > outcome.summary.results.teacher_alone["auroc"].mean - 0.02


def test_fewer_proxy_cases_cost_fewer_bytes(run_app):
    few, all_cases = (
        run_app({"proxy-cases": cases}).summary.bytes_up_per_site_per_round for cases in (50, 0)
    )
    assert few.max <= 121 + CODECS["int8"].longest(50, 2) < 0.7 * all_cases.mean


@pytest.mark.parametrize(
    ("method", "student"), [("descent", "linear"), ("descent", "mlp"), ("fedmd", "linear")]
)
def test_other_proxy_cases_in_every_round_teach_as_well_in_no_more_bytes(run_app, method, student):
    changes = {
        "method": method,
        "student.model": student,
        "proxy-cases": 50,
        "proxy-subsets": "per-round",
        "num-rounds": 8,
    }
    outcome = run_app(changes)
    assert outcome.summary.bytes_up_per_site_per_round.max <= 121 + CODECS["int8"].longest(50, 2)
    assert outcome.auroc > outcome.summary.results.teacher_alone["auroc"].mean - 0.015


def test_a_jury_judges_the_cases_of_its_round(run_app):
    changes = {
        "aggregation.rule": "stacking",
        "proxy-cases": 60,
        "proxy-subsets": "per-round",
        "num-rounds": 4,
    }
    outcome = run_app(changes)
    assert outcome.auroc > outcome.summary.results.teacher_alone["auroc"].mean - 0.015


def test_models_of_the_users_own_teach_and_learn(run_app, tmp_path, monkeypatch):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "class Small(nn.Module):\n"
        "    def __init__(self, case_shape, num_classes):\n"
        "        super().__init__()\n"
        "        self.inner = nn.Sequential(nn.Linear(case_shape[0], 8), nn.BatchNorm1d(8), nn.Tanh())\n"
        "        self.outer = nn.Linear(8, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.outer(self.inner(x))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outcome = run_app({"teacher.model": "own_models:Small", "student.model": "own_models:Small"})
    assert outcome.summary.history[-1].answered == ("cleveland", "hungary", "long-beach", "switzerland")
    assert outcome.auroc > 0.7


@pytest.mark.parametrize("method", ["descent", "oneshot", "fedmd"])
@pytest.mark.parametrize("seed", [0, 2])
def test_every_method_gains_on_its_teacher_or_loses_little(run_app, method, seed):
    outcome = run_app({"method": method, "num-rounds": 20, "seed": seed})
    assert outcome.auroc > outcome.summary.results.teacher_alone["auroc"].mean - 0.01
    assert outcome.summary.rounds == (1 if method == "oneshot" else 20)


@pytest.mark.parametrize("rule", ["mean", "trimmed-mean"])
def test_one_hostile_site_ruins_the_mean_but_not_the_trimmed_mean(run_app, rule):
    def opposite(true: bytes) -> bytes:
        said = Release.decode(true)
        scale, payload = CODECS[said.codec].encode(np.tile(np.float32([6350, -6350]), (said.cases, 1)))
        return replace(said, scale=scale, payload=payload).encode()

    changes = {"aggregation.rule": rule, "num-rounds": 3}
    outcome = run_app(changes, Courier(body(opposite)))
    unharmed = outcome.summary.results.federation["accuracy"].mean > 0.75
    assert unharmed == (rule == "trimmed-mean")


def test_the_same_seed_gives_the_same_result_to_the_bit_and_another_seed_another(run_app):
    def told(outcome):
        summary = outcome.summary.model_dump()
        for key in ("seconds", "peak_memory_mib", "finished", "run_id"):
            summary.pop(key)
        for key in ("out", "run-id"):
            summary["run_config"].pop(key)
        return summary

    changes = {"num-rounds": 3, "students": "mixed"}
    one, other = run_app(changes), run_app(changes)
    assert one.models == other.models
    assert told(one) == told(other)
    bodies = [
        [unseal(reply.content) for reply, _ in each.replies if reply.metadata.message_type != LEARN]
        for each in (one, other)
    ]
    assert bodies[0] == bodies[1]
    assert run_app(changes | {"seed": 1}).models != one.models


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_a_task_says_what_z_says(scale):
    z_PC = np.random.default_rng(0).normal(size=(20, 3)) * scale
    plan = plan_of(RunConfig(), study="s", proxy_digest=bytes(32), classes=3)
    task = Task.decode(draw_up(plan, 1, np.arange(20, dtype=np.int32), z_PC).encode())
    soft_PC = softmax(z_PC / plan.student.temperature, axis=1)
    np.testing.assert_allclose(np.exp(task.log_soft_labels_PC.astype(np.float64)), soft_PC, atol=2e-3)


def test_a_run_whose_sites_have_all_spent_their_budget_ends_with_what_it_learned(run_app):
    class Spent(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            reply = real_app(message, context)
            if message.metadata.message_type != LEARN or Task.decode(unseal(message.content)).round < first:
                return reply
            idle = replace(Release.decode(unseal(reply.content)), steps=0)
            return Message(seal(idle.encode()), reply_to=message)

    first = 3
    ended = run_app({"num-rounds": 4}, Spent())
    assert (ended.summary.rounds, ended.summary.rounds_planned) == (2, 4)
    assert ended.epsilon("hungary") > 0.9  # the whole plan's, as ever
    first = 1
    with pytest.raises(UserError, match="round 1: 0 sites took part"):
        run_app({"num-rounds": 4}, Spent())
