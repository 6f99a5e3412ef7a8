"""How an answer is judged: metrics, cases, gate rules, verifier audit, failure router. Needs no torch."""
