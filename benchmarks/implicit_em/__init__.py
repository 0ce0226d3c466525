"""The tables of `implicit_em_paper.py`, and what they share."""
