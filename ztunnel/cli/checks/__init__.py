"""`ambient check`: facts are gathered (facts.py), judged (judge.py), and shown (verbs/check.py)."""
