"""A study: measurements of this machine, each a command and two files in results/bench/. Nothing imports it."""
