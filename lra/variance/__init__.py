"""What random features cost: their bias and variance beside closed forms."""
