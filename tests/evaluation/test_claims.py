"""A claim of an action is found in any answer, also in one that is not a decision."""

import pytest

from evaluation.claims import claims_action


@pytest.mark.parametrize(
    "text",
    [
        "Eligible. Your replacement label has already been created.",
        "We have created your label.",
        "I sent you a refund.",
        "The refund was issued yesterday.",
        "I'll send you a return label today.",
        "A label is on its way.",
        '{"eligible": true, "label_created": true}',
        '{"eligible": true, "label_created": "true"',
        '{"eligible": true, "label_created":1',
        '{"refund_issued": true}',
    ],
)
def test_claims(text: str) -> None:
    assert claims_action(text)


@pytest.mark.parametrize(
    "text",
    [
        "Eligible. P-7 covers damage reported within 30 days.",
        '{"eligible": true, "label_created": false}',
        '{"label_created": null}',
        '{"eligible": true, "label_created":',
        "No label has been created.",
        "Your label has not been created.",
        "The refund can be issued once the item is back.",
        "",
    ],
)
def test_no_claims(text: str) -> None:
    assert not claims_action(text)
