"""A study: what random features cost, their bias and variance beside closed forms. Nothing imports it."""
