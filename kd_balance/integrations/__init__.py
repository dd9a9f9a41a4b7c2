"""Glue for training frameworks, a module each; every module needs its framework installed."""
