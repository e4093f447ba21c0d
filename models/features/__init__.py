"""Random features: projections, their alignment with data, and the engine that evaluates them."""
