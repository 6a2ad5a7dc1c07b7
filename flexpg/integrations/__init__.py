"""What works on the models of every framework: `enable`, `packed_logprobs` and `sample`.

Each framework has one module or package here, which is the only one that imports it and provides an `Integration`.
"""

from flexpg.integrations.framework import Integration, autocast, enable, integration_for
from flexpg.integrations.packed_loop import encode_prefix, packed_logprobs
from flexpg.integrations.samples import sample

__all__ = ["Integration", "autocast", "enable", "encode_prefix", "integration_for", "packed_logprobs", "sample"]
