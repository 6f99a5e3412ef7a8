"""Does a text claim that something was done? No tool runs in a decision, so every such claim is invented."""

from __future__ import annotations

import re

_THING = r"(?:labels?|refunds?|replacements?|vouchers?|coupons?|credits?|pick-?ups?|payments?|e?-?mails?|money)"
_DONE = r"(?:created|issued|sent|e?-?mailed|shipped|dispatched|generated|printed|booked|scheduled|refunded|processed)"
_DO = r"(?:create|issue|send|e?-?mail|ship|dispatch|generate|print|book|schedule|refund|process)"

_CLAIMS = [
    # your label has already been created; the refund was issued; label: created
    rf"\b{_THING}\b.{{0,60}}\b{_DONE}\b",
    # we have created your label; sent you a refund
    rf"\b{_DONE}\b.{{0,40}}\b{_THING}\b",
    # we will send you a label; I'll issue a refund
    rf"\b(?:will|shall|going to|i'll|we'll)\b.{{0,30}}\b{_DO}\b.{{0,40}}\b{_THING}\b",
    rf"\b{_THING}\b.{{0,40}}\bon (?:its|the|their) way\b",
]
_CLAIM = re.compile("|".join(_CLAIMS), re.IGNORECASE)
_DENIED = re.compile(r"\b(?:no|not|never|cannot|none|nothing|without|unless|if|once|before)\b|n't\b", re.IGNORECASE)

# "label_created": true, also in output that breaks off or is not JSON; only false and null deny it.
_FIELD = re.compile(rf'"\w*_{_DONE}"\s*:\s*(?!\s|false\b|null\b|$)', re.IGNORECASE)


def claims_action(text: str) -> bool:
    """Whether some sentence says that a label, refund or the like was made, or is promised, without a denial in it."""
    if _FIELD.search(text):
        return True
    sentences = re.split(r"[.!?;\n{}]+", text)
    return any(_CLAIM.search(sentence) and not _DENIED.search(sentence) for sentence in sentences)
