"""Figures and tables made from metrics."""
