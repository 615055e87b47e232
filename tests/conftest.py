"""Settings that all tests share."""

import os

# Before anything imports torch: results and timings must not depend on how many cores there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("tests", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("tests")
