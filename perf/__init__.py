"""Measurements; every figure quoted anywhere comes from a script here and its file in perf/results/."""
