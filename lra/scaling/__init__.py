"""Many runs on one machine or many: sweeps, clusters, and what they cost."""
