"""Many runs on one machine or many: sweeps, clusters, and what they will cost. Imports training and records."""
