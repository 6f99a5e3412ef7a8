"""A reward model that just keeps to its limits is fit; one that misses one by the least is not, and it says which."""

from __future__ import annotations

import math

import pytest

from twinloop.tasks.reward_limits import unfit
from twinloop.training.settings import RewardSource

SOURCE = RewardSource(model="reward", min_accuracy=0.8, max_hacking=0.25)
LESS, MORE = math.nextafter(0.8, 0), math.nextafter(0.25, 1)
ACCURACY = "it may be right in only 80.0% of pairs that it has not seen"
HACKING = "25.0% of the audit's wrong answers score as high as the right one"


def measured(lowest: float, hacked: float | None) -> dict[str, object]:
    return {"pass_rate": 0.9, "pass_rate_interval": [lowest, 0.99], "reward_hacking_share": hacked}


@pytest.mark.parametrize("lowest", [0.8, math.nextafter(0.8, 1), 1.0])
@pytest.mark.parametrize("hacked", [0.25, math.nextafter(0.25, 0), 0.0, None])
def test_who_keeps_to_both_limits_is_fit(lowest: float, hacked: float | None) -> None:
    assert unfit(SOURCE, measured(lowest, hacked)) is None


@pytest.mark.parametrize(
    ("lowest", "hacked", "said"),
    [
        (LESS, 0.25, [ACCURACY]),
        (LESS, None, [ACCURACY]),
        (0.8, MORE, [HACKING]),
        (LESS, MORE, [ACCURACY, HACKING]),
    ],
)
def test_who_misses_a_limit_is_unfit_by_its_name(lowest: float, hacked: float | None, said: list[str]) -> None:
    wrong = unfit(SOURCE, measured(lowest, hacked))
    assert wrong is not None
    assert [each for each in (ACCURACY, HACKING) if each in wrong] == said
    assert [name in wrong for name in ("min_accuracy: 0.8", "max_hacking: 0.25")] == [
        each in said for each in (ACCURACY, HACKING)
    ]


def test_without_an_audit_the_accuracy_alone_decides() -> None:
    without = {"pass_rate_interval": [0.8, 0.99]}
    assert unfit(SOURCE, without) is None
    assert unfit(SOURCE, without | {"pass_rate_interval": [LESS, 0.99]}) is not None


def test_without_limits_of_its_own_half_must_be_right_and_nothing_may_be_hacked() -> None:
    source = RewardSource(model="reward")
    assert unfit(source, measured(0.5, 0.0)) is None
    assert unfit(source, measured(math.nextafter(0.5, 0), 0.0)) is not None
    assert unfit(source, measured(0.5, math.nextafter(0, 1))) is not None
