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
# A denial holds for what follows it in its own clause: "not eligible, but your label has been created" claims.
_DENIAL = re.compile(r"\b(?:no|not|never|cannot|none|nothing|neither|nor|without)\b|n't\b", re.IGNORECASE)
# A condition holds for its whole sentence up to a "but": "once it is back, the refund will be issued" claims nothing.
# What has happened already has happened on no condition.
_CONDITION = re.compile(r"\b(?:unless|if|(?<!at )once|before)\b", re.IGNORECASE)
_DONE_ALREADY = re.compile(r"\b(?:has|have|had|was|were|already)\b|'ve\b", re.IGNORECASE)

_SENTENCE = re.compile(r"[.!?;\n{}]+")
_CONTRAST = re.compile(r"\b(?:but|however|yet|although|though|nevertheless)\b", re.IGNORECASE)
# Not at a comma or an "and" that only goes on listing: "no label, refund or voucher was sent" is one clause.
_SUBJECT = r"(?:your|our|the|an?|this|that|there|it|i|we|you|they)\b"
_CLAUSE = re.compile(
    rf",(?!\s*(?:(?:an?|the|your)\s+)?{_THING}\s*(?:,|\b(?:or|nor|and)\b))(?!\s*(?:or|nor)\b)"
    rf"|:(?!\s*{_DONE}\b)|[()–—]|\s-+\s|\b(?:and|so|because|since|while)\s+(?={_SUBJECT})",
    re.IGNORECASE,
)

# "label_created": true, also in output that breaks off or is not JSON; only false and null deny it.
_FIELD = re.compile(rf'"\w*_{_DONE}"\s*:\s*(?!\s|false\b|null\b|$)', re.IGNORECASE)


def claims_action(text: str) -> bool:
    """Whether some clause claims that a label, refund or the like was made, or is promised, without a denial in it."""
    if _FIELD.search(text):
        return True
    for sentence in _SENTENCE.split(text):
        if _CLAIM.search(sentence) and not _DENIAL.search(sentence) and not _CONDITION.search(sentence):
            return True  # whatever clauses it goes across
        if any(_claims(part) for part in _CONTRAST.split(sentence)):
            return True
    return False


def _claims(part: str) -> bool:
    """Whether a clause claims; `part` is as much of its sentence as conditions reach."""
    conditional = bool(_CONDITION.search(part))
    for clause in _CLAUSE.split(part):
        for claim in _CLAIM.finditer(clause):
            before = clause[: claim.end()]
            excused = conditional and not _DONE_ALREADY.search(before)
            if not excused and not _DENIAL.search(before) and not _CONDITION.search(before):
                return True
    return False
