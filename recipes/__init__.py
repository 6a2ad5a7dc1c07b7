"""Recipes for `tune run`, which needs a package here; never installed."""

import logging
import warnings

# torchao 0.13 to 0.15 says at import that it skips its C++ kernels on newer torch (pytorch/ao#2919); none is used here.
logging.getLogger("torchao").setLevel(logging.ERROR)

# torchtune's RMSNorm computes in float32 whatever its weight; torch warns where that weight, frozen or not, is in bf16.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
