"""Prefix search: the objective L_q, the proposals of candidates, and the greedy algorithm."""
