"""Tasks: what is asked (spec, sources, items) and how an answer is judged (scorers, judge)."""
