"""The paper's experiments and what came of them."""
