"""What is refused before any site is asked: whatever would show when patients have paid for it already."""

from common.config import RunConfig
from common.datasets import PublicData, sites
from common.errors import ConfigError, UserError
from common.fitness import CASES, require_judgement_apart
from common.metrics import headline_metric
from common.models import private_ready
from common.plan import plan_of
from server.methods import method_of
from server.stacking import FEWEST
from server.teacher import check_start, choose_cases, outline_of


def check(config: RunConfig, public: PublicData) -> None:
    """Refuse a run that can't end well.

    Raises:
        UserError: naming the key that is wrong, or what keeps a student from being trained in private.
    """
    method_of(config)
    if config.resumable and not config.run_id:
        raise ConfigError("run config", "run-id", "", "a name, since the run is resumable")
    choose_cases(config, len(public.proxy))
    expected_sites = len(sites(config))
    caps = config.privacy.site_epsilons
    for key, value, sites_named in (
        ("min-sites", config.min_sites, config.min_sites),
        ("privacy.site-epsilons", caps, len(caps.split(","))),
    ):
        if sites_named > expected_sites:
            expected = f"at most the {expected_sites} sites there are"
            raise ConfigError("run config", key, value, expected)
    if config.patience and config.schedule[0] == 1:
        raise ConfigError("run config", "patience", config.patience, "0: the run has one round")
    _check_test_cases(public)
    _check_validation_cases(config, public)
    _check_jury(config, public)
    _check_budget(config, public)
    check_start(config, public.proxy)
    _check_models(config, public)


def _check_test_cases(public: PublicData) -> None:
    classes, labels = public.proxy.preprocessing.classes, public.test.y
    absent = [name for number, name in enumerate(classes) if number not in labels]
    if absent and headline_metric(classes) == "auroc":
        expected = f"test cases of both classes, and none is {absent[0]!r}"
        raise ConfigError("run config", "data.test-size", len(labels), expected)


def _check_validation_cases(config: RunConfig, public: PublicData) -> None:
    if (public.validation.y >= 0).any():
        return
    for key, wanted in (
        ("aggregation.validated", config.aggregation.validated),
        ("patience", config.patience),
    ):
        if wanted:
            raise ConfigError(
                "run config", key, wanted, "labelled public validation cases, and there are none"
            )


def _check_jury(config: RunConfig, public: PublicData) -> None:
    labelled = int((public.validation.y >= 0).sum())
    if config.aggregation.rule == "stacking" and labelled < FEWEST:
        expected = f"another rule: {labelled} labelled validation cases can't judge movements"
        raise ConfigError("run config", "aggregation.rule", "stacking", expected)


def _check_budget(config: RunConfig, public: PublicData) -> None:
    classes = len(public.proxy.preprocessing.classes)
    plan = plan_of(config, study="unnamed", proxy_digest=public.proxy.digest, classes=classes)
    poorest = min(config.privacy.most_epsilon(place) for place in range(len(sites(config))))
    try:
        plan.within(poorest, plan.rounds).noise_multiplier()
    except UserError as error:
        expected = f"one that {plan.rounds * plan.steps_per_round} private steps can be priced for ({error})"
        raise ConfigError("run config", "privacy.epsilon", config.privacy.epsilon, expected) from None


def _check_models(config: RunConfig, public: PublicData) -> None:
    outlines = {}
    for part, settings in (("student", config.student), ("teacher", config.teacher)):
        try:
            outlines[part] = outline_of(config, public.proxy, settings)
        except ConfigError as error:
            raise ConfigError("run config", f"{part}.{error.key}", error.value, error.expected) from None
    teacher = outlines["teacher"]
    require_judgement_apart(teacher.model, teacher.phi(public.proxy.x[: 2 * CASES]))
    private_ready(outlines["student"].model, outlines["student"].features.shape)
