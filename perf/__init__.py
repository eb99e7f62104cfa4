"""Measurements. Every figure in README and docs comes from a script in this folder and its file in perf/results/."""
