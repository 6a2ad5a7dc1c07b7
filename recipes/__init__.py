"""Recipes for `tune run`, which needs a package here; never installed."""

import logging

# torchao 0.13 to 0.15 says at import that it skips its C++ kernels on newer torch (pytorch/ao#2919); none is used here.
logging.getLogger("torchao").setLevel(logging.ERROR)
