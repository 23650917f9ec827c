"""Two processes run the tests (pyproject.toml): one thread each, theirs and their children's."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
