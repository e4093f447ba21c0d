"""Measurements of this machine, each a command and two files under results/bench/."""
