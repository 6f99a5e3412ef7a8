"""A claim of an action is found in any answer, also in one that is not a decision."""

import pytest

from twinloop.domains.returns.claims import claims_action


@pytest.mark.parametrize(
    "text",
    [
        "Eligible. Your replacement label has already been created.",
        "We have created your label.",
        "I sent you a refund.",
        "The refund was issued yesterday.",
        "I'll send you a return label today.",
        "A label is on its way.",
        "Not eligible, but your label has been created.",
        "Not eligible but your label has been created.",
        "Not eligible: your label has been created",
        "Not eligible (your label has been created).",
        "Not eligible - your refund was issued",
        "It is not eligible, your refund was issued all the same.",
        "You are not eligible and your label has been created.",
        "No, your label has been created.",
        "No problem, we have created your label.",
        "There is no policy for it, however a voucher was sent.",
        "If you look at your mail, your label was sent yesterday.",
        "Your label was created at once.",
        "Without delay, we have issued your refund.",
        "Your label has been created without delay.",
        "Your label was created once and is not lost.",
        "The label was not created, but the refund was issued.",
        "No label has been created, I'll send you a refund.",
        "Not eligible, label created.",
        "We have, as you asked, created your label.",
        "label: created",
        "Your label, though late, was created.",
        "When you wrote, we sent your label.",
        '{"note": "not eligible", "message": "your label has been created"',
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
        "Not eligible, and no label has been created.",
        "No label, refund or replacement has been created.",
        "No label, refund, or replacement has been created.",
        "Neither a label nor a refund was issued.",
        "I have not created and sent a label.",
        "Your label has not, as of today, been created.",
        "We haven't sent you a refund, but we can talk about it.",
        "It is eligible without a label being created.",
        "The refund can be issued once the item is back.",
        "Once the item is back, the refund will be issued.",
        "Once your refund has been issued, you will hear from us.",
        "If the item is back, your refund can be issued.",
        "A label is created only if the policy allows it, and it does not.",
        "Not eligible, but a label can be created if you appeal.",
        "",
    ],
)
def test_no_claims(text: str) -> None:
    assert not claims_action(text)
