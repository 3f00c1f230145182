"""Estimators of values and rewards that the saddle problem is compared with."""
